"""From processes to a mesh: init and destroy, spawn, how ranks meet, faults on purpose."""
