"""The command line: python -m gingham train, plan, doctor, bench, ckpt."""
