"""The app as a script: `python app.py` is `studio app`."""

import sys

from studio.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "app")
    main()
