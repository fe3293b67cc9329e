"""An authority and certificates for the addresses of this machine, as a cluster with TLS has them."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID


def make(directory: Path, name: str) -> dict[str, str]:
    """Makes an authority and one certificate signed by it; returns Ray's variables for them.

    Args:
        directory: Gets `ca.crt`, `node.crt` and `node.key`.
        name: Of the authority.
    """
    directory.mkdir()
    ca_key, node_key = (rsa.generate_private_key(65537, 2048) for _ in range(2))
    ca_name = _named(name)
    ca = _signed(ca_name, ca_name, ca_key, ca_key, x509.BasicConstraints(ca=True, path_length=0))
    names = [x509.DNSName("localhost"), *(x509.IPAddress(ipaddress.ip_address(a)) for a in addresses())]
    node = _signed(_named("ray"), ca_name, node_key, ca_key, x509.SubjectAlternativeName(names))
    pem = serialization.Encoding.PEM
    private = (pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths = {name: directory / name for name in ("ca.crt", "node.crt", "node.key")}
    paths["node.key"].touch(mode=0o600)
    paths["node.key"].write_bytes(node_key.private_bytes(*private))
    paths["ca.crt"].write_bytes(ca.public_bytes(pem))
    paths["node.crt"].write_bytes(node.public_bytes(pem))
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(paths["ca.crt"]),
        "RAY_TLS_SERVER_CERT": str(paths["node.crt"]),
        "RAY_TLS_SERVER_KEY": str(paths["node.key"]),
    }


def addresses() -> list[str]:
    """Loopback, and the address that Ray takes for a node's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # of a datagram socket: chooses an interface, sends nothing
        return ["127.0.0.1", str(probe.getsockname()[0])]
    return ["127.0.0.1"]


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: rsa.RSAPrivateKey,
    issuer_key: rsa.RSAPrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(extension, critical=False)
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
    return builder.not_valid_after(now + datetime.timedelta(days=1)).sign(issuer_key, hashes.SHA256())
