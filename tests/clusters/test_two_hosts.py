"""Two hosts with a cable between them that is pulled in the middle of a run and of a dump, and plugged in again.

See two_hosts.py for what they are. Training goes over gloo, which is told its interface; the folder is shared by being
that of this machine, so a host that is cut off still sees it, as one with a storage network of its own does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from potstill.storage import StoreReader, store_status
from potstill.teacher_dump import dump
from tests.clusters.pages import commands
from tests.clusters.test_torchrun import newest_checkpoint, train_lines
from tests.clusters.two_hosts import CABLE, Host, two_hosts, why_not
from tests.clusters.working_folder import dump_config, environment, make_folder, started, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TRAIN, ONE_MACHINE, ELASTIC_DUMP, SEAL = commands("torchrun")
TIMEOUT_SECONDS = 60  # DEEPSPEED_TIMEOUT=1
SILENCE = "does not answer any more"
TIMED_OUT = f"Timed out waiting {1000 * TIMEOUT_SECONDS}ms"


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path) as hosts:
        yield hosts


def typed(host: Host, line: str, *, folder: Path, first: Host, **more: object) -> Any:
    """A line of a page on a host. Agents meet at the first one, which is told so: all have loopback addresses."""
    line = line.replace("node-a:29400", f"{first.address}:29400")
    meet = f"is_host={int(host == first)},last_call_timeout=3"
    line = line.replace("--rdzv-id", f"--rdzv-conf {meet} --rdzv-id")  # where the page starts torchrun itself
    env = environment(
        NUM_RANKS=1,
        NODES="1:2",
        RDZV_CONF=meet,
        GLOO_SOCKET_IFNAME=CABLE,
        DS_ACCELERATOR="cpu",
        DEEPSPEED_TIMEOUT=1,
        **more,
    )
    return started(
        host.inside(["bash", "-c", f"cd {folder} && {line}"]),
        folder=folder,
        output=folder / f"{host.name}.log",
        env=env,
    )


def said(folder: Path, host: Host) -> str:
    return (folder / f"{host.name}.log").read_text(errors="replace")


def test_a_run_continues_without_the_host_that_is_cut_off_and_with_it_when_it_is_back(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, run={"max_steps": 10**6}, checkpoint={"every_steps": 20})
    dump(dump_config(folder))
    run, (a, b) = folder / "runs" / "mine", hosts
    with typed(a, TRAIN, folder=folder, first=a) as on_a, typed(b, TRAIN, folder=folder, first=a) as on_b:
        wait_until(lambda: newest_checkpoint(run)[1] == 2, seconds=240, what="a checkpoint of two", alive=on_a)
        b.pull_the_cable()
        pulled = time.monotonic()
        # Ranks wait for one another no longer than they were told, on both sides, and say why they end.
        for host in hosts:
            wait_until(
                lambda host=host: SILENCE in said(folder, host),
                seconds=TIMEOUT_SECONDS + 60,
                what=f"the end of the rank on {host.name}",
            )
            assert time.monotonic() - pulled > TIMEOUT_SECONDS / 2  # nobody told them
        wait_until(lambda: newest_checkpoint(run)[1] == 1, seconds=240, what="a checkpoint of one", alive=on_a)
        # The agent that is cut off may not begin a run of its own: it asks the endpoint, which does not answer.
        assert json.loads((run / "writer.json").read_text())["marks"][0]["host"] == a.name
        assert on_b.poll() is None
        alone = newest_checkpoint(run)[0]
        b.plug_it_in_again()

        def two_again() -> bool:
            return newest_checkpoint(run)[1] == 2

        # TCP tries once more after 120 s at most. The agent then joins again or, if it has waited too long for an
        # answer, ends: both are seen, by which of its two threads was waiting.
        wait_until(lambda: two_again() or on_b.poll() is not None, seconds=300, what="b's agent", alive=on_a)
        with ExitStack() as stack:
            if on_b.poll() is not None:
                assert on_b.poll() != 0 and "RendezvousConnectionError" in said(folder, b)
                on_b = stack.enter_context(typed(b, TRAIN, folder=folder, first=a))
            wait_until(two_again, seconds=300, what="two ranks again", alive=on_a)
            assert newest_checkpoint(run)[0] > alone
            (run / "stop").touch()
            assert 0 not in [on_a.wait(120), on_b.wait(120)]
    assert not (run / "writer.json").exists()
    steps = list(train_lines(run))
    assert steps == list(range(1, steps[-1] + 1)) and newest_checkpoint(run) == (steps[-1], 2)


def test_workers_of_a_dump_need_no_network(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    folder, (a, b) = make_folder(tmp_path, num_texts=2500, rows_per_unit=4), hosts
    store = folder / "data" / "targets"
    line = "python -m potstill.launch dump --tokens data/train --teacher models/teacher --output data/targets"
    lines = [f"{line} --worker {number} --num-workers 2" for number in range(2)]
    with typed(a, lines[0], folder=folder, first=a) as on_a, typed(b, lines[1], folder=folder, first=a) as on_b:
        wait_until(
            lambda: (store / "run.json").exists() and store_status(store).committed >= 3,
            seconds=240,
            what="units",
            alive=on_a,
        )
        b.pull_the_cable()
        assert store_status(store).missing
        assert [on_a.wait(300), on_b.wait(300)] == [0, 0]
    assert not store_status(store).missing


def test_a_group_that_is_cut_in_two_ends_and_continues(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    folder, (a, b) = make_folder(tmp_path, num_texts=2500, rows_per_unit=4), hosts
    store = folder / "data" / "elastic"
    # One teacher in shards over both hosts, and as many hosts as that takes.
    line = ELASTIC_DUMP.replace("--nnodes 1:2 --max-restarts 100", "--nnodes 2 --max-restarts 0") + " --engine zero3"
    with typed(a, line, folder=folder, first=a) as on_a, typed(b, line, folder=folder, first=a) as on_b:
        wait_until(
            lambda: (store / "run.json").exists() and store_status(store).committed >= 3,
            seconds=240,
            what="units",
            alive=on_a,
        )
        b.pull_the_cable()
        pulled = time.monotonic()
        assert on_a.wait(TIMEOUT_SECONDS + 120) != 0 and time.monotonic() - pulled > TIMEOUT_SECONDS / 2
        for host in hosts:
            wait_until(lambda host=host: TIMED_OUT in said(folder, host), seconds=60, what=f"the rank on {host.name}")
        assert store_status(store).missing
        b.plug_it_in_again()
        assert on_b.wait(240) != 0  # its agent asks the endpoint before it ends: see above
    with typed(a, line, folder=folder, first=a) as on_a, typed(b, line, folder=folder, first=a) as on_b:
        assert [on_a.wait(300), on_b.wait(300)] == [0, 0]
    calm = line.replace("data/elastic", "data/calm")
    with typed(a, calm, folder=folder, first=a) as on_a, typed(b, calm, folder=folder, first=a) as on_b:
        assert [on_a.wait(300), on_b.wait(300)] == [0, 0]
    assert StoreReader(store).digest == StoreReader(folder / "data" / "calm").digest
