"""`python -m runtime.gpu_check`: first takes in the wheels that this machine lacks."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def take_in(folder: Path) -> None:
    """Install a folder's wheels for this process and those that it starts, and use the extension compiled for them."""
    place = tempfile.mkdtemp(prefix="outrider-wheels-")
    wheels = sorted(map(str, folder.glob("*.whl")))
    if wheels:
        quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", place]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *wheels], stdout=sys.stderr)
        if done.returncode:
            print(f"the wheels in {folder} could not be installed; going on with what is here", file=sys.stderr)
    sys.path.append(place)  # behind what the machine has
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), place)))
    os.environ.setdefault("OUTRIDER_PREBUILT", str(folder.absolute()))


if __name__ == "__main__":
    if "--wheels" in sys.argv:
        take_in(Path(sys.argv[sys.argv.index("--wheels") + 1]))
    from runtime.gpu_check.main import main

    sys.exit(main())
