"""Signatures with real ssh keys through ssh-keygen: what holds, what does not, and what each error says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from potstill.launch.cli import main
from potstill.storage import StoreError, StoreReader, StoreWriter, repair_store, seal_store, sign_store
from potstill.storage.files.checked_json import dump_checked, load_checked
from tests.storage.damage import unit_file
from tests.storage.stores import tokens_spec, write_tokens

needs_ssh_keygen = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen on this machine")


def make_key(path: Path, passphrase: str = "") -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-C", "a test", "-f", str(path)]
    subprocess.run(command, check=True, timeout=30)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    root = tmp_path_factory.mktemp("keys")
    return {name: make_key(root / name, phrase) for name, phrase in (("own", ""), ("other", ""), ("locked", "secret"))}


@pytest.fixture
def store(tmp_path):
    return Path(write_tokens(tmp_path / "t", 10).url)


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def verify(store, key, capsys, *options):
    code = main(["verify", str(store), "--key", str(key), *options])
    told = capsys.readouterr()
    return code, told.out + told.err


@needs_ssh_keygen
def test_a_signed_store_holds_for_its_key_and_no_other(store, keys, tmp_path, capsys):
    assert main(["seal", str(store), "--sign", str(keys["own"])]) == 0
    code, told = verify(store, public(keys["own"]), capsys)
    assert code == 0 and "signed by a key of" in told and "--deep holds the bytes against it" in told
    assert verify(store, public(keys["own"]), capsys, "--deep")[0] == 0
    code, told = verify(store, public(keys["other"]), capsys)
    assert code == 3 and "was made with a key that" in told and "does not list" in told
    both = tmp_path / "both.pub"
    both.write_text(f"# who may sign\n{public(keys['other']).read_text()}\n{public(keys['own']).read_text()}")
    assert verify(store, both, capsys)[0] == 0
    signers = tmp_path / "allowed_signers"
    for namespaces, wanted in (("", 0), ('namespaces="potstill-store" ', 0), ('namespaces="git" ', 3)):
        signers.write_text(f"ada@example.org {namespaces}{public(keys['own']).read_text()}")
        assert verify(store, signers, capsys)[0] == wanted, namespaces


@needs_ssh_keygen
def test_a_signature_is_of_one_manifest_and_for_one_purpose(store, keys, tmp_path, capsys):
    code, told = verify(store, public(keys["own"]), capsys)
    assert code == 3 and "is not signed" in told and "--sign KEY" in told
    sign_store(store, keys["own"])
    # Another store's signature, and one that was made for something else.
    signature = store / "manifest.json.sig"
    own = signature.read_bytes()
    other = Path(write_tokens(tmp_path / "o", 6).url)
    sign_store(other, keys["own"])
    shutil.copy(other / "manifest.json.sig", signature)
    assert main(["verify", str(store), "--key", str(public(keys["own"])), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["signature_checked"] and found["findings"][0]["part"] == "signature"
    assert "does not hold for manifest.json" in found["findings"][0]["text"]
    command = ["ssh-keygen", "-q", "-Y", "sign", "-f", str(keys["own"]), "-n", "file", str(store / "manifest.json")]
    signature.unlink()
    subprocess.run(command, check=True, timeout=30, capture_output=True)
    assert verify(store, public(keys["own"]), capsys)[0] == 3
    for damaged in (b"", own[: len(own) // 2], b"no signature", bytes(len(own))):
        signature.write_bytes(damaged)
        assert verify(store, public(keys["own"]), capsys)[0] == 3
    signature.write_bytes(own)
    assert verify(store, public(keys["own"]), capsys)[0] == 0


@needs_ssh_keygen
def test_forged_checksums_do_not_pass_a_signature(store, keys, capsys):
    """CRCs that fit are no authentication: an edited total and an edited unit are seen where the signature is asked."""
    sign_store(store, keys["own"])
    whole = (store / "manifest.json").read_bytes()
    manifest = load_checked(whole, where="manifest")
    (store / "manifest.json").write_bytes(dump_checked(manifest | {"num_entries": 7}))
    assert verify(store, public(keys["own"]), capsys)[0] == 3
    (store / "manifest.json").write_bytes(whole)
    unit = unit_file(store, 1)
    unit.write_bytes(unit.read_bytes()[::-1])
    code, told = verify(store, public(keys["own"]), capsys, "--deep")
    assert code == 3 and unit.name in told


@needs_ssh_keygen
def test_a_repaired_store_is_signed_again(store, keys, capsys):
    sign_store(store, keys["own"])
    unit_file(store, 2).unlink()
    moved = dict(repair_store(store).moved)
    assert "manifest.json.sig" in moved and not (store / "manifest.json.sig").exists()


@needs_ssh_keygen
def test_a_signed_store_is_still_a_store(store, keys):
    """The file beside the manifest is in nobody's way: the same run is resumed, and force deletes it with the rest."""
    sign_store(store, keys["own"])
    assert StoreReader(store).num_rows == 10 and seal_store(store).num_rows == 10
    StoreWriter.create(store, tokens_spec())
    StoreWriter.create(store, tokens_spec(), force=True)
    assert not (store / "manifest.json.sig").exists()


@needs_ssh_keygen
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("locked", "has a passphrase: give it to an agent first .`ssh-add .*locked"),
        ("absent", "is not a file; --sign takes an ssh key"),
        ("text", "--sign takes an ssh key"),
        ("own.pub", "signing with .*own2.pub failed"),
    ],
)
def test_a_key_that_cannot_sign_is_told_before_anything_is_sealed(
    store, keys, key, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "text").write_text("no key")
    shutil.copy(public(keys["own"]), tmp_path / "own2.pub")  # without the private half beside it
    places = {"locked": keys["locked"], "own.pub": tmp_path / "own2.pub"}
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    assert main(["seal", str(store), "--sign", str(places.get(key, tmp_path / key))]) == 1
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert not (store / "manifest.json").exists()


@needs_ssh_keygen
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("own", "is a private key; --key takes the public one"),
        ("nothing", "cannot be read"),
        ("text", "holds no public ssh keys"),
    ],
)
def test_a_file_of_no_public_keys_is_refused(store, keys, key, message, tmp_path, capsys):
    (tmp_path / "text").write_text("no key\n")
    code, told = verify(store, keys["own"] if key == "own" else tmp_path / key, capsys)
    assert code == 1 and message in told


@needs_ssh_keygen
@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="no ssh-agent on this machine")
def test_an_agent_signs_with_a_locked_key(store, keys, tmp_path, monkeypatch, capsys):
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        ask = tmp_path / "ask"
        ask.write_text("#!/bin/sh\necho secret\n")
        ask.chmod(0o755)
        asking = {**os.environ, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"}
        for _ in range(50):
            added = subprocess.run(
                ["ssh-add", str(keys["locked"])], env=asking, timeout=30, capture_output=True, start_new_session=True
            )
            if added.returncode == 0:
                break
            time.sleep(0.05)
        assert added.returncode == 0, added.stderr
        assert main(["seal", str(store), "--sign", str(keys["locked"])]) == 0
        assert verify(store, public(keys["locked"]), capsys)[0] == 0
    finally:
        agent.terminate()
        agent.wait(10)


def test_without_ssh_keygen_both_commands_say_so(store, tmp_path, monkeypatch, capsys):
    (tmp_path / "key.pub").write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA a test\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, told = verify(store, tmp_path / "key.pub", capsys)
    assert code == 1 and "need ssh-keygen, which is not here" in told
    with pytest.raises(StoreError, match="need ssh-keygen"):
        sign_store(store, tmp_path / "key.pub")
