"""A real kube-apiserver with etcd, in a network namespace of its own, for as long as a test session.

Neither program is part of this project. The server is looked for in $DIST_FT_KUBE_APISERVER, then in
../shared/tools beside the repository (version 1.20.2, xz); etcd and openssl on PATH or in $DIST_FT_ETCD
(Debian: etcd-server). A namespace needs root. It knows no pods' life: only what is refused is learnt from it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.k8s import crd

_PACKED = crd.ROOT.parent / "shared" / "tools" / "kube-apiserver-1.20.2-linux-amd64.xz"
_START_LIMIT_S = 120.0
_STRIPPED = ("default", "x-kubernetes-validations", "x-kubernetes-map-type", "x-kubernetes-list-type",
             "x-kubernetes-list-map-keys")  # fmt: skip


def why_absent() -> str | None:
    """Returns what is missing here, or None."""
    if not (os.environ.get("DIST_FT_KUBE_APISERVER") or _PACKED.is_file()):
        return f"no kube-apiserver at {_PACKED}; set DIST_FT_KUBE_APISERVER"
    if _etcd() is None:
        return "no etcd on PATH; install it (Debian: etcd-server) or set DIST_FT_ETCD"
    if shutil.which("kubectl") is None or shutil.which("openssl") is None:
        return "kubectl and openssl must be on PATH"
    if subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode != 0:
        return "a network namespace needs root"
    return None if crd.are_there() else crd.WHY_ABSENT


def _etcd() -> str | None:
    return os.environ.get("DIST_FT_ETCD") or shutil.which("etcd")


class Server:
    """Kubectl for the server, as its administrator."""

    def __init__(self, namespace_pid: int, kubeconfig: Path) -> None:
        self._enter = ["nsenter", "-t", str(namespace_pid), "-n"]
        self._kubeconfig = kubeconfig

    def kubectl(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs kubectl inside the namespace."""
        command = [*self._enter, "kubectl", f"--kubeconfig={self._kubeconfig}", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=120)

    def dry_run(self, *manifests: dict[str, Any]) -> str:
        """Returns what the server says against the objects; nothing when it would take them all."""
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        # 1.20 knows no field validation of newer clients, but an unknown field in its own schema it does refuse.
        result = self.kubectl("apply", "--dry-run=server", "-f", "-", stdin=text)
        return result.stderr.strip() if result.returncode else ""


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Starts etcd and the server and makes KubeRay's kinds known to it."""
    _certificates(folder)
    script = folder / "serve.sh"
    script.write_text(_SERVE.format(folder=folder, etcd=_etcd(), server=_server(folder)))
    process = subprocess.Popen(["unshare", "-n", "bash", str(script)], stdin=subprocess.PIPE)
    try:
        server = Server(process.pid, _kubeconfig(folder))
        _wait(server, process)
        for kind in ("RayJob", "RayCluster"):
            result = server.kubectl("create", "--validate=false", "-f", "-", stdin=json.dumps(_reduced(kind)))
            assert result.returncode == 0, result.stderr
        server.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        yield server
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the script ends both
        process.wait(60)


_SERVE = """
ip link set lo up
cd {folder}
{etcd} --data-dir etcd --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
  --listen-peer-urls http://127.0.0.1:2380 --unsafe-no-fsync > etcd.log 2>&1 < /dev/null &
etcd=$!
{server} --etcd-servers http://127.0.0.1:2379 --bind-address 127.0.0.1 --advertise-address 127.0.0.1 \
  --secure-port 6443 --cert-dir certs --client-ca-file ca.crt --authorization-mode RBAC \
  --service-cluster-ip-range 10.96.0.0/24 --service-account-issuer https://kubernetes.default.svc \
  --service-account-key-file sa.pub --service-account-signing-key-file sa.key \
  --disable-admission-plugins ServiceAccount --endpoint-reconciler-type none > server.log 2>&1 < /dev/null &
server=$!
cat > /dev/null
kill $server $etcd
wait
"""


def _server(folder: Path) -> str:
    given = os.environ.get("DIST_FT_KUBE_APISERVER")
    if given:
        return given
    path = folder / "kube-apiserver"
    with lzma.open(_PACKED) as packed, path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    path.chmod(0o755)
    return str(path)


def _certificates(folder: Path) -> None:
    """Makes an authority, a client of the group that may do everything, and the key of service accounts."""
    days = ["-days", "2"]
    for command in (
        [
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
            "-subj",
            "/CN=ca",
            *days,
        ],
        [
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "me.key",
            "-out",
            "me.csr",
            "-subj",
            "/O=system:masters/CN=me",
        ],
        [
            "x509",
            "-req",
            "-in",
            "me.csr",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-out",
            "me.crt",
            *days,
        ],
        ["genrsa", "-out", "sa.key", "2048"],
        ["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"],
    ):
        subprocess.run(["openssl", *command], cwd=folder, capture_output=True, check=True)


def _kubeconfig(folder: Path) -> Path:
    path = folder / "kubeconfig"
    user = {"client-certificate": str(folder / "me.crt"), "client-key": str(folder / "me.key")}
    cluster = {"server": "https://127.0.0.1:6443", "insecure-skip-tls-verify": True}
    path.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": cluster}], "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "dist-ft"}}],
    }))  # fmt: skip
    return path


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while server.kubectl("get", "--raw", "/readyz").returncode != 0:
        assert process.poll() is None, "the server's script has ended"
        assert time.monotonic() < deadline, "the server did not become ready"
        time.sleep(0.5)


def _reduced(kind: str) -> dict[str, Any]:
    """Returns a CRD without what 1.20 does not take."""
    name = {"RayJob": "ray.io_rayjobs.json.gz", "RayCluster": "ray.io_rayclusters.json.gz"}[kind]
    definition: dict[str, Any] = json.loads(gzip.decompress((crd.CRDS / name).read_bytes()))
    definition["spec"]["versions"] = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    for version in definition["spec"]["versions"]:
        version["schema"] = _strip(version["schema"])
    return definition


def _strip(node: Any, is_named: bool = False) -> Any:
    """Drops keywords, but never a property that happens to have a keyword's name."""
    if isinstance(node, list):
        return [_strip(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _strip(value, key == "properties" and not is_named)
        for key, value in node.items()
        if is_named or key not in _STRIPPED
    }
