"""A Python package index, reached as pip on this machine would reach it.

The address is, in pip's own order: PIP_INDEX_URL, pip's configuration files, the default built
into pip. Extra indexes, proxies and certificates are honoured likewise. Standard library only.
"""

import base64
import configparser
import glob
import hashlib
import html.parser
import http.client
import os
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

ATTEMPTS = 4
TIMEOUT_S = 60
CHUNK = 1 << 20


class PackageIndexError(Exception):
    """A message for the user: one line that says what to do."""


def pip_settings():
    """Keys of pip's configuration files, the more specific file last, then PIP_* variables."""
    home = os.path.expanduser("~")
    config_home = os.environ.get("XDG_CONFIG_HOME", os.path.join(home, ".config"))
    files = [
        "/etc/xdg/pip/pip.conf",
        "/etc/pip.conf",
        os.path.join(home, ".pip", "pip.conf"),
        os.path.join(config_home, "pip", "pip.conf"),
        os.path.join(sys.prefix, "pip.conf"),
        os.environ.get("PIP_CONFIG_FILE", ""),
    ]
    settings = {}
    for path in filter(None, files):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
        except (configparser.Error, UnicodeDecodeError) as error:
            raise PackageIndexError(f"pip's configuration {path} cannot be read: {error}") from error
        for section in ("global", "install", "download"):
            if parser.has_section(section):
                settings.update(parser.items(section))
    for key in ("index-url", "extra-index-url", "cert", "proxy"):
        value = os.environ.get("PIP_" + key.upper().replace("-", "_"))
        if value:
            settings[key] = value
    return settings


def default_index_url(scratch):
    """The address built into pip: the installed one, the copy ensurepip carries, or Debian's package."""
    read = "import pip._internal.models.index as i; print(i.PyPI.simple_url)"

    def ask(pip_wheel=None):
        env = dict(os.environ, PYTHONPATH=pip_wheel) if pip_wheel else None
        done = subprocess.run([sys.executable, "-c", read], env=env, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    url = ask()
    if url:
        return url
    folders = [
        os.path.join(sysconfig.get_path("stdlib"), "ensurepip", "_bundled"),
        sysconfig.get_config_var("WHEEL_PKG_DIR") or "/usr/share/python-wheels",
    ]
    for folder in folders:
        for wheel in sorted(glob.glob(os.path.join(folder, "pip-*.whl"))):
            url = ask(wheel)
            if url:
                return url
    try:
        subprocess.run(["apt-get", "download", "python3-pip-whl"], cwd=scratch, check=True, capture_output=True)
        (package,) = glob.glob(os.path.join(scratch, "python3-pip-whl*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True, capture_output=True)
        (wheel,) = glob.glob(os.path.join(scratch, "usr/share/python-wheels/pip-*.whl"))
        url = ask(wheel)
    except (OSError, subprocess.CalledProcessError, ValueError):
        url = ""
    if not url:
        raise PackageIndexError("no pip is here to read the package index's address from: set PIP_INDEX_URL")
    return url


class _Links(html.parser.HTMLParser):
    """Targets of the anchors of a simple-index page."""

    def __init__(self):
        super().__init__()
        self.targets = []

    def handle_starttag(self, tag, attrs):
        target = dict(attrs).get("href")
        if tag == "a" and target:
            self.targets.append(target)


class PackageIndex:
    """Finds and downloads files by exact name; `scratch` is a folder for temporary files."""

    def __init__(self, scratch):
        settings = pip_settings()
        index_url = settings.get("index-url") or default_index_url(scratch)
        self.urls = [index_url, *settings.get("extra-index-url", "").split()]
        cafile = (
            settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or None
        )
        try:
            # Without a file of its own the context reads SSL_CERT_FILE and the system's store.
            context = ssl.create_default_context(cafile=cafile)
        except (OSError, ssl.SSLError) as error:
            raise PackageIndexError(f"certificates {cafile} cannot be read: {error}") from error
        handlers = [urllib.request.HTTPSHandler(context=context)]
        if settings.get("proxy"):
            handlers.append(urllib.request.ProxyHandler({"http": settings["proxy"], "https": settings["proxy"]}))
        self._opener = urllib.request.build_opener(*handlers)

    def _open(self, url):
        """Opens `url`, whose user and password, if any, go into the Authorization header."""
        parts = urllib.parse.urlsplit(url)
        headers = {"User-Agent": "envoy-kv-router-tools", "Accept": "text/html, */*;q=0.1"}
        if parts.username is not None:
            secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
            parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        request = urllib.request.Request(urllib.parse.urlunsplit(parts), headers=headers)
        return self._opener.open(request, timeout=TIMEOUT_S)

    def find(self, project, filename):
        """The address of `filename` among the files of `project`."""
        problems = []
        for index in self.urls:
            page_url = f"{index.rstrip('/')}/{project}/"
            try:
                with self._open(page_url) as answer:
                    base, page = answer.geturl(), answer.read().decode("utf-8", "replace")
            except (OSError, ValueError, http.client.HTTPException) as error:
                problems.append(f"{_shown(page_url)}: {error}")
                continue
            links = _Links()
            links.feed(page)
            for target in links.targets:
                url = urllib.parse.urljoin(base, target).partition("#")[0]
                if urllib.parse.unquote(url.rpartition("/")[2]) == filename:
                    return _with_user_of(index, url)
            problems.append(f"{_shown(page_url)} does not list it")
        raise PackageIndexError(f"{filename} was not found: " + "; ".join(problems))

    def download(self, project, filename, sha256, path, progress):
        """Writes `filename` to `path` once its digest is `sha256`; `progress(done, total)` in bytes."""
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                print(f"    {problem}: trying again", flush=True)
                time.sleep(2**attempt)
            try:
                found = self._copy(self.find(project, filename), path, progress)
            except (PackageIndexError, OSError, ValueError, http.client.HTTPException) as error:
                problem = str(error)
                continue
            if found == sha256:
                return
            problem = f"{filename} has sha256 {found}, expected {sha256}"
        raise PackageIndexError(f"{problem} (given up after {ATTEMPTS} attempts)")

    def _copy(self, url, path, progress):
        digest, done = hashlib.sha256(), 0
        folder = os.path.dirname(path)
        with self._open(url) as answer, tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
            try:
                total = int(answer.headers.get("Content-Length") or 0)
                while True:
                    chunk = answer.read(CHUNK)
                    if not chunk:
                        break
                    digest.update(chunk)
                    part.write(chunk)
                    done += len(chunk)
                    progress(done, total)
                os.replace(part.name, path)
            except BaseException:
                os.unlink(part.name)
                raise
        return digest.hexdigest()


def _shown(url):
    """`url` without its password, for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _with_user_of(index, url):
    """`url` with the user and password of `index`, which are for its own host only."""
    at, parts = urllib.parse.urlsplit(index), urllib.parse.urlsplit(url)
    if "@" in at.netloc and "@" not in parts.netloc and at.netloc.rpartition("@")[2] == parts.netloc:
        parts = parts._replace(netloc=at.netloc)
    return urllib.parse.urlunsplit(parts)
