"""What A3C needs around it: processes, what they share, files, videos, curves.

Importing it refuses a system that the program cannot run on, so main.py and test.py do it first.
They and this file keep to a syntax that older Pythons can read.
"""

import importlib.util
import sys

NEEDED = ("torch", "gym", "ale_py", "cv2", "numpy", "imageio_ffmpeg", "matplotlib")


def _obstacle():
    """Return in one line what keeps the program from running here, or None."""
    if sys.version_info < (3, 11):  # noqa: UP036
        return "Python 3.11 or newer is needed, and this is {}.{}".format(*sys.version_info[:2])
    if sys.platform == "win32":
        return "this program needs Linux or macOS; on Windows, run it inside WSL"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return (
            "not installed for {}: {}; run it with the Python of the environment that the README's "
            "install line makes".format(sys.executable, ", ".join(missing))
        )
    return None


_what = _obstacle()
if _what and "ray" in sys.modules:  # on another machine: Ray tells the head (see link.py)
    raise ImportError(_what)
if _what:
    sys.stderr.write("error: " + _what + "\n")
    sys.exit(2)
