"""Signatures of sealed stores with ssh keys: `ssh-keygen -Y sign` and `-Y verify` over the bytes of manifest.json.

The manifest names the sha256 of the index and of every unit, and the fingerprint of run.json: what it vouches for is
the whole store, as far as `verify --deep` reads it. No cryptography of our own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from potstill.storage.errors import StoreError, UnsealedError
from potstill.storage.files.folder import StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.finding import Finding
from potstill.storage.store.seal import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME

NAMESPACE = "potstill-store"  # a signature made for another purpose does not hold for a store
MAX_SIGNATURE_BYTES = 1 << 16
TIMEOUT_SECONDS = 60.0  # a key on a token waits for a touch
_OWNER = "owner"  # stands for whoever holds the key, where a public key alone is given
_PUBLIC_KEY = re.compile(r"(ssh|ecdsa|sk)-\S+ +AAAA\S+")


def check_key(key: Path) -> None:
    """Raise StoreError where no signature could be made with `key`: said before a store is sealed, not after."""
    if not os.path.isfile(key):
        raise StoreError(f"{key} is not a file; --sign takes an ssh key (`ssh-keygen -t ed25519 -f KEY` makes one)")
    _run(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], b"probe", what=f"signing with {key}", key=key)


def sign_store(path: StorePath, key: Path) -> None:
    """Sign a sealed store: writes manifest.json.sig, in the place of an older one.

    `key` is a private key without a passphrase, or a key (private or public) whose private half an agent holds. Raises
    StoreError that says what is in the way, UnsealedError where there is no manifest to sign.
    """
    folder = open_folder(path)
    command = ["-Y", "sign", "-f", str(key), "-n", NAMESPACE]
    signature = _run(command, _manifest(folder), what=f"signing {folder.url} with {key}", key=key)
    folder.put(SIGNATURE_NAME, signature)


def signature_findings(path: StorePath, keys: Path) -> tuple[Finding, ...]:
    """What is wrong with the signature of a store, nothing where it holds for one of `keys`.

    `keys` is an allowed-signers file of ssh-keygen, or one or more public keys, one a line. Raises StoreError where
    nothing can be said: no ssh-keygen, no such file, a file of another kind, a store that is not sealed.
    """
    folder = open_folder(path)
    manifest = _manifest(folder)
    signature = folder.read(SIGNATURE_NAME, max_bytes=MAX_SIGNATURE_BYTES)
    where = f"{folder.url}/{SIGNATURE_NAME}"
    with _allowed(keys) as allowed, tempfile.TemporaryDirectory(prefix="potstill_signature_") as scratch:
        _tool()
        if signature is None:
            return _finding(f"{where}: the store is not signed; `potstill seal {folder.url} --sign KEY` signs it")
        file = _scratch_file(Path(scratch) / SIGNATURE_NAME, signature)
        found = _call(["-Y", "find-principals", "-s", str(file), "-f", str(allowed)], b"")
        if found.returncode:
            reason = _text(found)
            if "no principal" in reason.lower():
                reason = f"it was made with a key that {keys} does not list"
            return _finding(f"{where}: {reason}; do not use the store unless you know who signed it")
        reasons = []
        for signer in found.stdout.decode(errors="replace").split("\n"):
            if signer:
                command = ["-Y", "verify", "-f", str(allowed), "-I", signer, "-n", NAMESPACE, "-s", str(file)]
                checked = _call(command, manifest)
                if checked.returncode == 0:
                    return ()
                reasons.append(_text(checked))
    return _finding(
        f"{where}: the signature does not hold for {MANIFEST_NAME} ({'; '.join(reasons) or 'no signer'}): the store "
        "was sealed again or changed since it was signed"
    )


def _finding(text: str) -> tuple[Finding, ...]:
    return (Finding(part="signature", kind="signature", text=text, file=SIGNATURE_NAME),)


def _manifest(folder: StoreFolder) -> bytes:
    data = folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    if data is None:
        raise UnsealedError(
            f"{folder.url} is not sealed, so there is no manifest to sign or to hold a signature against"
        )
    return data


@contextmanager
def _allowed(keys: Path) -> Iterator[Path]:
    """An allowed-signers file: the one that was given, or one made of the public keys in it."""
    try:
        lines = [line.strip() for line in keys.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{keys} cannot be read as text ({error}); --key takes public ssh keys") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if any("PRIVATE KEY" in line for line in lines):
        raise StoreError(f"{keys} is a private key; --key takes the public one, {keys}.pub")
    if not lines or not all(_PUBLIC_KEY.search(line) for line in lines):
        raise StoreError(f"{keys} holds no public ssh keys; --key takes a .pub file or an allowed-signers file")
    if not any(_PUBLIC_KEY.match(line) for line in lines):
        yield keys
        return
    with tempfile.TemporaryDirectory(prefix="potstill_signers_") as scratch:
        text = "".join(f"{_OWNER} {line}\n" if _PUBLIC_KEY.match(line) else f"{line}\n" for line in lines)
        yield _scratch_file(Path(scratch) / "allowed_signers", text.encode())


def _scratch_file(path: Path, data: bytes) -> Path:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror}); make room for temporary files") from error
    return path


def _run(command: Sequence[str], data: bytes, *, what: str, key: Path) -> bytes:
    done = _call(command, data)
    if done.returncode or not done.stdout:
        text = _text(done)
        if "passphrase" in text.lower():
            text = f"the key has a passphrase: give it to an agent first (`ssh-add {key}`)"
        elif "couldn't load public key" in text.lower() or "invalid format" in text.lower():
            text += "; --sign takes an ssh key"
        raise StoreError(f"{what} failed: {text}")
    return done.stdout


def _call(command: Sequence[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run ssh-keygen without a terminal, so that it fails where it would ask."""
    try:
        return subprocess.run(
            [_tool(), *command], input=data, capture_output=True, timeout=TIMEOUT_SECONDS, start_new_session=True
        )
    except OSError as error:
        raise StoreError(f"ssh-keygen cannot be run ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise StoreError(
            f"ssh-keygen gave no answer within {TIMEOUT_SECONDS:g} s (an agent or a token that waits?)"
        ) from error


def _tool() -> str:
    found = shutil.which("ssh-keygen")
    if found is None:
        raise StoreError("signatures need ssh-keygen, which is not here; install OpenSSH 8.2 or newer (openssh-client)")
    return found


def _text(done: subprocess.CompletedProcess[bytes]) -> str:
    text = " ".join((done.stderr + b"\n" + done.stdout).decode(errors="replace").split())
    return text or f"ssh-keygen ended with {done.returncode}"
