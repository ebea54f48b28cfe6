"""`python -m gingham train|plan|doctor|bench|ckpt`: the main job, the choice of a grid, what this
installation is made of, the microbenchmark, checkpoints."""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from .. import native
from ..plan.pipeline import SCHEDULES
from . import ckpt, doctor, plan
from .arguments import MODES
from .options import Parser, number, whole


def main(arguments: list[str] | None = None) -> int:
    """Ends at Ctrl-C, or where nobody reads the output or it cannot be written, in one line at most."""
    try:
        status = _main(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:  # a process started without one
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("gingham: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"gingham: {error}", file=sys.stderr)
        # what is left in the buffer would raise again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if isinstance(error, BrokenPipeError) else 1


def _main(arguments: list[str]) -> int:
    parser = Parser(prog="python -m gingham", description=__doc__)
    parser.add_argument("--version", action="version", version=f"gingham {native.version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|plan|doctor|bench|ckpt")
    _add_train(commands.add_parser("train", help="train a GPT on text over a grid of ranks"))
    doctor.add_arguments(commands.add_parser("doctor", help="versions, BLAS, cores, engines, what was built; --test tries it"))
    commands.add_parser("bench", help="run the microbenchmark (arguments are passed on)", add_help=False)
    plan.add_arguments(commands.add_parser("plan", help="what every grid of so many ranks would cost; starts nothing"))
    ckpt.add_arguments(commands.add_parser("ckpt", help="look into a checkpoint, or turn it into safetensors and back"))
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    runs = {"plan": plan.run, "ckpt": ckpt.run, "doctor": doctor.run}
    if chosen.command in runs:
        return runs[chosen.command](chosen)
    from .train import train

    return train(chosen)


def _add_train(parser: argparse.ArgumentParser) -> None:
    grid = parser.add_argument_group("grid")
    grid.add_argument("--ranks", type=whole(1), default=0, help="processes to start (default: torchrun's number, or what the grid needs)")
    grid.add_argument("--mode", choices=MODES, help="default: 2.5d with depth 2 on 8 ranks, or grid where --grid is given")
    grid.add_argument("--depth", type=whole(1), default=0, help="layers of a 2.5d grid (default: 2 in 2.5d)")
    grid.add_argument("--grid", type=_grid, metavar="pm,pn,pk", help="any grid instead of a mode")
    grid.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cpu, or GINGHAM_DEVICE; cuda: one rank a GPU, tried on one GPU only"
    )
    grid.add_argument("--sequence", action="store_true", help="1d: cut the rows between the layers instead of replicating them")
    grid.add_argument("--data", type=whole(1), default=1, metavar="D", help="data ranks, each of the grid; then the grid is 1d by default")
    grid.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        default=0,
        help="cut over --data: 1, 2 states and gradients, and weights at rest; 3 weights",
    )
    grid.add_argument("--pipeline", type=whole(1), default=1, metavar="P", help="pipeline ranks, each of --data grids; the model in stages")
    grid.add_argument("--schedule", choices=SCHEDULES, help="in which order stages run their micro-batches (default: 1f1b)")
    grid.add_argument(
        "--microbatches",
        type=whole(1),
        default=0,
        metavar="M",
        help="of a step (default: 2 x --pipeline, without one 1; any number of them)",
    )
    model = parser.add_argument_group("model")
    for name, value, text in (
        ("layers", 4, "transformer blocks"),
        ("width", 256, "features between the blocks"),
        ("heads", 8, "attention heads, which divide --width and are divided by the ranks that cut features"),
        ("context", 128, "tokens of a sample"),
    ):
        model.add_argument(f"--{name}", type=whole(1), default=value, help=text)
    model.add_argument("--dropout", type=number(0, 1, equal=True), default=0.1, help="probability of dropping an element")
    run = parser.add_argument_group("run")
    run.add_argument("--text", help="file or folder to read (default: the Python standard library's sources)")
    run.add_argument("--steps", type=whole(1), default=200, help="steps of the optimizer")
    run.add_argument("--batch", type=whole(1), default=8, help="samples of a step, over all ranks")
    run.add_argument("--lr", type=number(0), default=3e-4, help="learning rate of AdamW")
    run.add_argument("--seed", type=whole(0, 1 << 40), default=0, help="of weights, masks and batches")
    run.add_argument("--compare-serial", action="store_true", help="train the same torch.nn model in one process as well")
    run.add_argument("--sample", type=whole(0), default=160, metavar="BYTES", help="length of the text generated at the end")
    run.add_argument("--plot", default="loss.png", help="where the loss curve goes; '' for none")
    run.add_argument("--save", metavar="FOLDER", help="where a checkpoint goes at the end, or at Ctrl-C (default: none is written)")
    run.add_argument("--resume", metavar="FOLDER", help="go on to --steps from what --save wrote, on any grid (default: from the start)")


def _grid(text: str) -> tuple[int, int, int]:
    try:
        pm, pn, pk = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected three numbers such as 2,2,2") from None
    if min(pm, pn, pk) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected three numbers of at least 1")
    return pm, pn, pk


def bench(arguments: list[str]) -> int:
    """Runs the microbenchmark, which reads its options itself."""
    binary = Path(__file__).parent.parent / "bin" / "microbench"
    if not binary.exists():
        print(f"gingham bench: {binary} was not built; reinstall with `pip install .` or run `make build`", file=sys.stderr)
        return 2
    environment = dict(os.environ)
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin:
        # the binary knows nothing of torch, but computes with its BLAS
        environment.setdefault("GINGHAM_BLAS", str(Path(torch.origin).parent / "lib" / "libtorch_cpu.so"))
    with subprocess.Popen([str(binary), *arguments], env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            print(line.rstrip("\n"), file=sys.stderr)
    return process.returncode
