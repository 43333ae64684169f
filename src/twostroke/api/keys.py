"""API keys: who may ask, and whose KV blocks his requests may use."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from twostroke.api.http import header
from twostroke.errors import InvalidApiKey
from twostroke.messages import SECRET_HEADER, TENANT_HEADER

_MAX_TENANT = 256  # characters
_GUARDED = ("/generate", "/abort_request")


def tenant(key: str) -> str:
    """The salt of a key's requests that name none: the same on every router and worker, and nobody can guess it."""
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"2stroke tenant").hexdigest()


class Guard:
    """Lets requests for tokens through that carry one of the keys, if there are any, and says in the scope whose they
    are. Who knows the cluster secret, such as our router, has checked that already, and says so in a header.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], secret: str) -> None:
        self._app = app
        self._keys = [(_digest(key), tenant(key)) for key in keys]
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ``InvalidApiKey``."""
        if scope["type"] == "http" and (scope["path"].startswith("/v1/") or scope["path"] in _GUARDED):
            scope["twostroke.tenant"] = self._tenant(scope)
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str:
        if self._insider(scope):
            return (header(scope, TENANT_HEADER) or "")[:_MAX_TENANT]
        return self._check(header(scope, "authorization") or "") if self._keys else ""

    def _insider(self, scope: Scope) -> bool:
        if not self._secret:
            return not self._keys
        return hmac.compare_digest((header(scope, SECRET_HEADER) or "").encode("latin-1"), self._secret)

    def _check(self, authorization: str) -> str:
        """All keys are compared, each in constant time."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise InvalidApiKey("no API key was given: send it as Authorization: Bearer KEY")
        digest, found = _digest(key.strip()), ""
        for known, whose in self._keys:
            found = whose if hmac.compare_digest(digest, known) else found
        if not found:
            raise InvalidApiKey("the API key is not one that is accepted here")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
