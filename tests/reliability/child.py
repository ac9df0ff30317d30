"""The command line, with a log of how much of which file is known to be on the disk: `child.py LOG ARGUMENT…`.

A line of the log is "DEVICE INODE BYTES", written when os.fsync of a file has returned. What the log does not have, a
power cut may take (interrupt.py).
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fsync = os.fsync

    def logged(file: int) -> None:
        fsync(file)
        about = os.fstat(file if isinstance(file, int) else file.fileno())
        os.write(log, f"{about.st_dev} {about.st_ino} {about.st_size}\n".encode())

    os.fsync = logged
    sys.argv = ["palimpsest", *sys.argv[2:]]
    from palimpsest.cli import main as command

    command()


if __name__ == "__main__":
    main()
