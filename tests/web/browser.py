"""A browser for the page's tests: finds Chromium, or installs Debian's as root; else says what to install.

    python tests/web/browser.py     prints where it is
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The path that ELLA_KD_BROWSER names, or the first of the names on the PATH."""
    return os.environ.get("ELLA_KD_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


def install() -> None:
    """Debian's package, where apt is and we may."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", *words], check=False, stdout=sys.stderr,
                           env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


if __name__ == "__main__":
    if find() is None:
        install()
    if (found := find()) is None:
        sys.exit("make test-web needs Chromium or Chrome: as root `apt-get install chromium`, or name the program with "
                 "ELLA_KD_BROWSER=PATH")
    print(found)
