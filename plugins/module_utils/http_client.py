"""A small HTTP(S) client on the standard library: explicit proxies, redirects that keep tokens at home.

urllib reads proxies from the environment, forwards headers on redirects and cannot say which proxy answered;
for a download that has to explain what a proxy did to it, the connection is made here.
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import ssl
from dataclasses import dataclass, field
from typing import Optional
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

from .artifact import redact_url
from .errors import FleetfitError

USER_AGENT = "fleetfit/0.1"
MAX_REDIRECTS = 10  # as many as curl's users see in practice; urllib's limit too
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class ClientSettings:
    """Proxies as URLs, None for a direct connection; ``timeout_s`` is the longest silence of a peer."""

    proxy_http: Optional[str] = None
    proxy_https: Optional[str] = None
    no_proxy: Optional[str] = None
    ca_file: Optional[str] = None
    timeout_s: float = 30.0


@dataclass
class Answer:
    """An open response: read its body from ``response``, then call ``close``."""

    response: http.client.HTTPResponse
    connection: http.client.HTTPConnection
    url: str
    proxy: Optional[str]
    redirected: bool
    # Headers of the first answer, where a hub tells size and hash before it redirects to its storage.
    first_headers: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """Return the HTTP status."""
        return self.response.status

    def header(self, name: str) -> Optional[str]:
        """Return a header's value, None where it is missing."""
        return self.response.getheader(name)

    def describe(self) -> str:
        """Return who answered: the address without secrets, and the proxy if there was one."""
        return describe_route(self.url, self.proxy)

    def close(self) -> None:
        """Close the connection."""
        self.response.close()
        self.connection.close()


def describe_route(url: str, proxy: Optional[str]) -> str:
    """Return ``url`` without secrets and, where there is one, the proxy's host and port."""
    return f"{redact_url(url)} through the proxy {_proxy_name(proxy)}" if proxy else redact_url(url)


def _proxy_name(proxy: str) -> str:
    return urlsplit(proxy).netloc.rpartition("@")[2]


def proxy_for(url: str, settings: ClientSettings) -> Optional[str]:
    """Return the proxy's URL for ``url``, None for a direct connection."""
    parts = urlsplit(url)
    proxy = settings.proxy_https if parts.scheme == "https" else settings.proxy_http
    if not proxy or bypasses_proxy(parts.hostname or "", _port(parts), settings.no_proxy):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def bypasses_proxy(host: str, port: int, no_proxy: Optional[str]) -> bool:
    """Return whether ``no_proxy`` names ``host``: as ``*``, domain, host:port, address or network."""
    host = host.lower().rstrip(".")
    for entry in (no_proxy or "").replace(",", " ").split():
        entry = entry.lower()
        if entry == "*" or _in_network(host, entry):
            return True
        name, number = entry.rpartition(":")[::2]
        if name and number.isdecimal() and ":" not in name:
            if int(number) != port:
                continue
            entry = name
        entry = entry.lstrip("*").lstrip(".").strip("[]")
        if entry and (host == entry or host.endswith(f".{entry}")):
            return True
    return False


def _in_network(host: str, entry: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return False


def origin(url: str) -> tuple[str, str, int]:
    """Return (scheme, host, port) of ``url``: what a token may be sent to."""
    parts = urlsplit(url)
    return (parts.scheme, (parts.hostname or "").lower(), _port(parts))


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS.get(parts.scheme, 0)


def open_url(
    url: str,
    settings: ClientSettings,
    *,
    headers: Optional[dict[str, str]] = None,
    token: Optional[str] = None,
) -> Answer:
    """Send a GET request, follow redirects and return the open answer, whatever its status.

    ``token`` (for ``Authorization: Bearer``) and the user and password in ``url`` go to the origin of ``url``
    only, never to where it redirects. Raises OSError or http.client.HTTPException where no answer came,
    FleetfitError for what a retry cannot cure (``certificate_not_trusted``, ``proxy_refused``,
    ``proxy_unsupported``, ``too_many_redirects``).
    """
    home, current = origin(url), url
    first_headers: Optional[dict[str, str]] = None
    for _hop in range(MAX_REDIRECTS + 1):
        sent = {"User-Agent": USER_AGENT, "Accept": "*/*", "Accept-Encoding": "identity", **(headers or {})}
        if origin(current) == home:
            authorization = _basic(urlsplit(url)) or (f"Bearer {token}" if token else None)
            if authorization:
                sent["Authorization"] = authorization
        answer = _get(current, settings, sent)
        if first_headers is None:
            first_headers = {name.lower(): value for name, value in answer.response.getheaders()}
        location = answer.header("Location")
        if answer.status not in _REDIRECTS or not location:
            answer.redirected = current != url
            answer.first_headers = first_headers
            return answer
        answer.close()
        current = urljoin(current, location)
        if urlsplit(current).scheme not in _PORTS:
            break
    raise FleetfitError(
        f"{redact_url(url)} redirects more than {MAX_REDIRECTS} times or to something that is not HTTP.",
        code="too_many_redirects",
        remedy="Correct the source's address, or ask whoever runs the server.",
    )


def _get(url: str, settings: ClientSettings, headers: dict[str, str]) -> Answer:
    parts = urlsplit(url)
    host, port = parts.hostname or "", _port(parts)
    bare_netloc = parts.netloc.rpartition("@")[2]
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    proxy = proxy_for(url, settings)
    connection: http.client.HTTPConnection
    if proxy:
        through = urlsplit(proxy)
        if through.scheme != "http" or not through.hostname:
            raise FleetfitError(
                f"The proxy {_proxy_name(proxy)} has the scheme {through.scheme!r}.",
                code="proxy_unsupported",
                remedy="Write it as http://host:port; https addresses are tunnelled through it.",
            )
        credentials = _basic(through)
        proxy_headers = {"Proxy-Authorization": credentials} if credentials else {}
        proxy_port = through.port or 80
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                through.hostname, proxy_port, timeout=settings.timeout_s, context=_tls_context(settings)
            )
            connection.set_tunnel(host, port, headers=proxy_headers)
        else:
            connection = http.client.HTTPConnection(through.hostname, proxy_port, timeout=settings.timeout_s)
            target = urlunsplit((parts.scheme, bare_netloc, parts.path or "/", parts.query, ""))
            headers = {**headers, **proxy_headers}
    elif parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, port, timeout=settings.timeout_s, context=_tls_context(settings)
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=settings.timeout_s)
    try:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise FleetfitError(
            f"The certificate of {describe_route(url, proxy)} is not trusted: {error.verify_message}.",
            code="certificate_not_trusted",
            remedy="Give the authority's certificate in ca_file, or install it with "
            "host_baseline_ca_certificates.",
        ) from error
    except OSError as error:
        connection.close()
        # http.client says it this way when a proxy answers CONNECT with something other than 200.
        if "Tunnel connection failed" in str(error) and "Tunnel connection failed: 5" not in str(error):
            raise FleetfitError(
                f"The proxy {_proxy_name(proxy or '')} refused the connection to {host}:{port}: {error}.",
                code="proxy_refused",
                remedy="Allow this host at the proxy, correct the proxy's user and password, or use a "
                "mirror.",
            ) from error
        raise
    except http.client.HTTPException:
        connection.close()
        raise
    return Answer(response, connection, url, proxy, redirected=False)


def _basic(parts: SplitResult) -> Optional[str]:
    if parts.username is None:
        return None
    text = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return "Basic " + base64.b64encode(text.encode()).decode("ascii")


def _tls_context(settings: ClientSettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise FleetfitError(
            f"The CA file {settings.ca_file} cannot be used: {error}.",
            code="ca_file_unusable",
            remedy="Give a file of PEM certificates in ca_file.",
        ) from error
