"""Leases as files in a directory that processes or machines share. No locks, no clocks: exclusive creation alone.

A name is a folder, and its leases are files in it that count up: 1, 2, 3. The file with the highest number is the one
that holds. To take a lease over is to create the next file, which the file system lets one do and no other. The highest
number never falls, so that who was slow to take what he once saw free finds a higher one, and has lost.
"""

import dataclasses
import os
import pathlib

RELEASED = 'released'


@dataclasses.dataclass(frozen=True)
class Files:
    """Leases in a local (or mounted) directory. OSError where it cannot be read or written."""

    directory: pathlib.Path

    def read(self, name: str) -> tuple[int, str] | None:
        """Number and text of the lease that holds, RELEASED where it was given back; None where there never was one."""
        version = self._newest(name)
        if version == 0:
            return None
        try:
            return version, self._file(name, version).read_text(encoding='utf-8')
        except FileNotFoundError:  # a successor has just removed it
            return version, ''

    def take(self, name: str, version: int | None, token: str, text: str) -> int | None:
        """Makes the lease after `version` (None: the first) ours; gives its number, or None where another was first.

        `text` holds `token`, by which the lease is known as ours from now on.
        """
        ours = (version or 0) + 1
        file = self._file(name, ours)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open('x', encoding='utf-8') as new:
                new.write(text)
        except FileExistsError:
            return None
        if self._newest(name) != ours:  # others went on since `version` was read, and removed its successor
            file.unlink(missing_ok=True)
            return None
        for older in self._versions(name):
            if older < ours:
                self._file(name, older).unlink(missing_ok=True)
        return ours

    def renew(self, name: str, version: int, token: str, text: str) -> int | None:
        """Writes `text` into our own lease; gives its number, or None where another has taken it over."""
        if self._newest(name) != version:
            return None
        try:
            # In place: to replace the file by name could replace a successor's. Half a text is a change like any other.
            with self._file(name, version).open('r+', encoding='utf-8') as ours:
                if token not in ours.read():  # somebody emptied the directory, and another began anew
                    return None
                ours.seek(0)
                ours.write(text)
                ours.truncate()
        except FileNotFoundError:
            return None
        return version

    def release(self, name: str, version: int, token: str) -> None:
        """Gives our own lease back; nothing happens where another has taken it over."""
        self.renew(name, version, token, RELEASED)

    def _file(self, name: str, version: int) -> pathlib.Path:
        return self.directory / name / str(version)

    def _versions(self, name: str) -> list[int]:
        try:
            return [int(entry) for entry in os.listdir(self.directory / name) if entry.isdecimal()]
        except FileNotFoundError:
            return []

    def _newest(self, name: str) -> int:
        return max(self._versions(name), default=0)
