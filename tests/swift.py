"""A real object store for tests: OpenStack Swift with its S3 interface, on the loopback alone.

It honours exclusive puts, ranges and multipart uploads and refuses wrong secrets, which most
stand-ins do not. Needs the packages ``swift`` and ``s3fs`` (extra ``s3-tests``).
"""

import configparser
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

KEY, SECRET = "test:tester", "testsecret"
PARTS = ("account", "container", "object")
FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "s3api", "tempauth")
FILTERS += ("copy", "slo", "dlo", "symlink", "proxy-logging")
READY_S = 30


def missing() -> str | None:
    """Why there can be no server; None where there can."""
    if _command("proxy-server") is None:
        return "needs the package swift (extra s3-tests)"
    if importlib.util.find_spec("s3fs") is None:
        return "needs the package s3fs (extra s3)"
    return None


def _command(name: str) -> str | None:
    """A program of the package, beside this interpreter or where SWIFT_BIN says."""
    folders = [os.environ.get("SWIFT_BIN", ""), str(Path(sys.executable).parent)]
    return shutil.which(f"swift-{name}", path=os.pathsep.join(filter(None, folders)))


class SwiftServer:
    """One node: account, container, object and proxy servers.

    Args:
        folder: An empty folder, on a file system with extended attributes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[subprocess.Popen[bytes]] = []
        ports = _free_ports(len(PARTS) + 1)
        self.port = ports[-1]
        (folder / "node" / "disk").mkdir(parents=True)
        self._write("swift", {"swift-hash": {"swift_hash_path_suffix": "tests"}})
        for part, port in zip(PARTS, ports, strict=False):
            self._ring(part, port)
            self._write(f"{part}-server", self._storage(part, port))
        self._write("proxy-server", self._proxy())

    @property
    def options(self) -> dict[str, object]:
        """What fsspec's s3 needs to reach it."""
        return {"key": KEY, "secret": SECRET, "client_kwargs": self.client, "use_listings_cache": 0}

    @property
    def client(self) -> dict[str, str]:
        """Endpoint and region."""
        return {"endpoint_url": f"http://127.0.0.1:{self.port}", "region_name": "us-east-1"}

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables, for a command."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.client["endpoint_url"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the processes and wait until they answer."""
        for name in (*(f"{part}-server" for part in PARTS), "proxy-server"):
            command = [str(_command(name)), str(self.folder / f"{name}.conf")]
            with (self.folder / f"{name}.log").open("wb") as log:
                self._running.append(
                    subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                )
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.1)
        raise TimeoutError(f"swift did not answer within {READY_S} s; see {self.folder}")

    def stop(self) -> None:
        """End all processes that were started here."""
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()

    def _ring(self, part: str, port: int) -> None:
        builder, tool = str(self.folder / f"{part}.builder"), _command("ring-builder")
        for words in (
            ["create", "2", "1", "0"],
            ["add", f"r1z1-127.0.0.1:{port}/disk", "1"],
            ["rebalance"],
        ):
            # Its exit status says 1 for a mere warning.
            subprocess.run([str(tool), builder, *words], stdout=subprocess.DEVNULL, check=False)

    def _storage(self, part: str, port: int) -> dict[str, dict[str, object]]:
        return {
            "DEFAULT": self._common(port)
            | {"devices": self.folder / "node", "mount_check": "false", "fallocate_reserve": 0},
            "pipeline:main": {"pipeline": f"{part}-server"},
            f"app:{part}-server": {"use": f"egg:swift#{part}"},
        }

    def _proxy(self) -> dict[str, dict[str, object]]:
        filters: dict[str, dict[str, object]] = {
            f"filter:{name}": {"use": f"egg:swift#{name.replace('-', '_')}"} for name in FILTERS
        }
        filters["filter:s3api"] |= {"s3_acl": "false", "location": "us-east-1"}
        user = KEY.replace(":", "_")
        filters["filter:tempauth"] |= {f"user_{user}": f"{SECRET} .admin"}
        filters["filter:slo"] |= {"min_segment_size": 1}
        server = {"use": "egg:swift#proxy", "account_autocreate": "true"}
        return {
            "DEFAULT": self._common(self.port),
            "pipeline:main": {"pipeline": " ".join([*FILTERS, "proxy-server"])},
            "app:proxy-server": server | {"allow_account_management": "true"},
            **filters,
        }

    def _common(self, port: int) -> dict[str, object]:
        return {
            "bind_ip": "127.0.0.1",
            "bind_port": port,
            "workers": 1,
            "user": Path.home().owner(),
            "swift_dir": self.folder,
            "log_level": "WARNING",
        }

    def _write(self, name: str, sections: dict[str, dict[str, object]]) -> None:
        config = configparser.RawConfigParser(default_section="")
        config.read_dict({s: {k: str(v) for k, v in kv.items()} for s, kv in sections.items()})
        with (self.folder / f"{name}.conf").open("w") as file:
            config.write(file)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
