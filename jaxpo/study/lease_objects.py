"""Leases as objects of a bucket: one a name, and every change is on condition that nobody made one in between.

Cloud Storage numbers each object that it writes (its generation) and refuses a request that names another number than
that of the object which stands there, or 0 where there is none ("Request preconditions" in its documentation).
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxpo import storage

if TYPE_CHECKING:
    from google.cloud.storage import Blob

METADATA = 'lease'  # the text is the object's metadata: number and text then come in one answer
SECONDS_TO_ANSWER = 20.0
SECONDS_TO_RETRY = 60.0


class Objects:
    """Leases in a directory of a bucket. OSError where the service refuses or does not answer.

    The service takes about one change of an object a second: leases of less than some seconds are for tests.
    """

    def __init__(self, directory: storage.Path):
        from google.cloud.storage import Client
        from google.cloud.storage.retry import DEFAULT_RETRY

        bucket, _, self._prefix = str(directory).removeprefix(storage.SCHEME).partition('/')
        with _as_os_errors():
            self._bucket = Client(project=None).bucket(bucket)  # objects belong to buckets, not to projects
        self._patience = {'timeout': SECONDS_TO_ANSWER, 'retry': DEFAULT_RETRY.with_timeout(SECONDS_TO_RETRY)}

    def read(self, name: str) -> tuple[int, str] | None:
        """Generation and text of the lease that holds; None where there is none."""
        with _as_os_errors():
            blob = self._bucket.get_blob(self._key(name), **self._patience)
        return None if blob is None else (blob.generation, (blob.metadata or {}).get(METADATA, ''))

    def take(self, name: str, version: int | None, token: str, text: str) -> int | None:
        """Writes `text` in place of generation `version` (None: of nothing).

        `text` holds `token`, by which the lease is known as ours from now on.

        Returns:
          The new generation; None where another made a change in between.
        """
        while True:
            written = self._write(name, version or 0, text)
            if written is not None:
                return written
            seen = self.read(name)
            if seen is None or token not in seen[1]:
                return None
            if seen[1] == text:  # written, but the answer was lost and the request sent again
                return seen[0]
            version = seen[0]  # an earlier text of ours, of which no answer came

    renew = take

    def release(self, name: str, version: int, token: str) -> None:
        """Deletes our own lease; nothing happens where another has taken it over."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with _as_os_errors(), contextlib.suppress(NotFound, PreconditionFailed):
            self._blob(name).delete(if_generation_match=version, **self._patience)

    def _write(self, name: str, version: int, text: str) -> int | None:
        from google.api_core.exceptions import PreconditionFailed

        blob = self._blob(name)
        blob.metadata = {METADATA: text}
        with _as_os_errors():
            try:
                blob.upload_from_string('', if_generation_match=version, **self._patience)
            except PreconditionFailed:
                return None
        return blob.generation

    def _key(self, name: str) -> str:
        return f'{self._prefix.rstrip("/")}/{name}'.lstrip('/')

    def _blob(self, name: str) -> 'Blob':
        return self._bucket.blob(self._key(name))


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as error:
        raise OSError(f'{type(error).__name__}: {error}') from error
