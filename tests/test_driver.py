"""The driver's calls, against the pretended driver of fakecuda.cpp: errors by name, order within and between streams,
and two processes that exchange blocks in stream order."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_float, c_uint64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from easgd_local import kernels, linux
from easgd_local.backend import driver as module
from easgd_local.backend.driver import SYMBOLS, Attribute, Device, Driver, DriverError
from easgd_local.backend.resources import Context, DeviceMemory, Event, HostMemory, Module, Resource, Stream
from easgd_local.words import LINE_BYTES
from tests.conftest import eventually
from tests.driver_peers import PAGE, SLOTS, Rig, Shared, size_bytes, wrong_blocks
from tests.test_kernels import (
    FILES,
    KERNELS,
    WILD,
    assert_same_bits,
    by_the_operation,
    declared_in,
    vectors_of,
    wild_values,
)

pytest_plugins = ["tests.fake_cuda"]

ROOT = Path(__file__).parents[1]
DEADLINE_S = 30


@pytest.fixture
def rig(fake_cuda) -> Iterator[Rig]:
    with ExitStack() as stack:
        made = Rig(stack, Shared(16 * PAGE))
        yield made
        for index in range(PAGE // LINE_BYTES):
            made.shared.words[index] = 2**62  # lets go whatever a failed test left waiting
        made.stream.synchronize()


# Opening


@pytest.mark.usefixtures("fake_cuda")
def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setenv("EASGD_LIBCUDA", "libnowhere.so.7")
    with pytest.raises(DriverError, match=r"^NVIDIA's driver was not found \(libnowhere\.so\.7: .*\); install"):
        Driver.open()


@pytest.mark.usefixtures("fake_cuda")
def test_without_the_variable_the_machines_driver_is_meant(monkeypatch):
    monkeypatch.delenv("EASGD_LIBCUDA")
    loaded = []
    monkeypatch.setattr(module.ctypes, "CDLL", lambda path: loaded.append(path) or {}[path])
    with pytest.raises(KeyError):
        Driver.open()
    assert loaded == ["libcuda.so.1"]


def test_a_driver_that_is_too_old_is_named_with_its_version(fake_cuda, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_VERSION", "11060")
    with pytest.raises(DriverError, match=r"supports CUDA 11\.6: .* at least 11\.7; update NVIDIA's driver"):
        Driver.open()
    monkeypatch.setenv("FAKE_CUDA_VERSION", "11070")
    assert Driver.open().version == 11070


@pytest.mark.usefixtures("fake_cuda")
def test_no_device_is_said_whether_the_driver_fails_or_counts_zero(monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    with pytest.raises(DriverError, match=r"finds 0 devices: at least 1 is needed; see what nvidia-smi .* the CPU\.$"):
        Driver.open()
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuInit=100")
    with pytest.raises(DriverError, match=r"^cuInit failed with CUDA_ERROR_NO_DEVICE \(100\): .*nvidia-smi") as raised:
        Driver.open()
    assert raised.value.code == 100


@pytest.mark.parametrize("missing", ["cuDriverGetVersion", "cuStreamWriteValue64_v2"])
def test_a_library_that_lacks_a_call_is_told_which(missing, tmp_path, monkeypatch):
    there = [name for name in SYMBOLS if name != missing]
    text = "".join(f'extern "C" int {name}(int* first) {{ *first = 13000; return 0; }}\n' for name in there)
    (tmp_path / "partial.cpp").write_text(text)
    command = ["g++", "-shared", "-fPIC", tmp_path / "partial.cpp", "-o", tmp_path / "partial.so"]
    subprocess.run(command, check=True)
    monkeypatch.setenv("EASGD_LIBCUDA", str(tmp_path / "partial.so"))
    with pytest.raises(DriverError, match=rf"partial\.so lacks {missing}: .* CUDA 11\.7 or newer has it; install"):
        Driver.open()


# Devices


def test_a_device_says_what_it_is(rig):
    device = rig.device
    assert (device.name, device.pci_bus_id, device.compute_capability) == ("Fake GPU 0", "0000:10:00.0", (9, 0))
    assert {which.name: device.attribute(which) for which in Attribute} == {
        "COMPUTE_MODE": 0, "ASYNC_ENGINES": 2, "COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0,
        "HOST_REGISTER": 1, "HOST_PAGE_TABLES": 0, "MEMOPS_64": 1,
    }  # fmt: skip


@pytest.mark.parametrize("number", [-1, 2])
def test_a_device_that_is_not_there_is_refused_with_how_many_are(number, fake_cuda, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    assert Device(Driver.open(), 1).name == "Fake GPU 1"
    with pytest.raises(ValueError, match=rf"^device={number}: this process sees 2, counted from 0; choose"):
        Device(Driver.open(), number)


def test_a_device_without_64_bit_operations_says_so_and_refuses_them(rig, monkeypatch):
    assert rig.device.memops_64
    monkeypatch.setenv("FAKE_CUDA_ATTR", "122=0")
    assert not rig.device.memops_64
    for operation in (rig.stream.wait_value, rig.stream.write_value):
        with pytest.raises(DriverError, match=r"CUDA_ERROR_NOT_SUPPORTED \(801\): .*; choose a way .* without it\.$"):
            operation(rig.word(0), 1)


# Every error by name


def give_back(resource: Resource) -> None:
    """Closes a second owner of the same thing, so that the first can close it when the error is over."""
    Resource(resource.driver, resource.handle, *resource._give_back).close()


CALLS: dict[str, Callable[[Rig], Any]] = {
    "cuDriverGetVersion": lambda rig: Driver.open(),
    "cuInit": lambda rig: Driver.open(),
    "cuDeviceGetCount": lambda rig: Driver.open(),
    "cuDeviceGet": lambda rig: Device(rig.driver),
    "cuDeviceGetName": lambda rig: Device(rig.driver),
    "cuDeviceGetPCIBusId": lambda rig: Device(rig.driver),
    "cuDeviceGetAttribute": lambda rig: rig.device.compute_capability,
    "cuDeviceCanAccessPeer": lambda rig: rig.device.reaches(rig.device),
    "cuDevicePrimaryCtxRetain": lambda rig: Context.retain(rig.device),
    "cuDevicePrimaryCtxRelease_v2": lambda rig: give_back(rig.context),
    "cuCtxSetCurrent": lambda rig: rig.context.make_current(),
    "cuMemHostRegister_v2": lambda rig: HostMemory.register(rig.driver, rig.shared.address, PAGE),
    "cuMemHostGetDevicePointer_v2": lambda rig: rig.host.device_address(),
    "cuMemHostUnregister": lambda rig: give_back(rig.host),
    "cuMemGetInfo_v2": lambda rig: rig.driver.free_bytes(),
    "cuMemAlloc_v2": lambda rig: DeviceMemory.allocate(rig.driver, 1),
    "cuMemFree_v2": lambda rig: give_back(rig.memory),
    "cuStreamCreateWithPriority": lambda rig: Stream.create(rig.driver),
    "cuStreamDestroy_v2": lambda rig: give_back(rig.stream),
    "cuStreamSynchronize": lambda rig: rig.stream.synchronize(),
    "cuStreamQuery": lambda rig: rig.stream.is_done(),
    "cuStreamWaitEvent": lambda rig: rig.stream.wait_event(rig.event),
    "cuStreamWaitValue64_v2": lambda rig: rig.stream.wait_value(rig.word(0), 0),
    "cuStreamWriteValue64_v2": lambda rig: rig.stream.write_value(rig.word(0), 0),
    "cuMemcpyHtoDAsync_v2": lambda rig: rig.stream.copy_to_device(rig.memory.handle, rig.host.handle, 4),
    "cuMemcpyDtoHAsync_v2": lambda rig: rig.stream.copy_to_host(rig.host.handle, rig.memory.handle, 4),
    "cuMemcpyDtoDAsync_v2": lambda rig: rig.stream.copy_on_device(rig.memory.handle, rig.memory.handle + 64, 4),
    "cuMemsetD32Async": lambda rig: rig.stream.fill(rig.memory.handle, 0, 4),
    "cuEventCreate": lambda rig: Event.create(rig.driver),
    "cuEventDestroy_v2": lambda rig: give_back(rig.event),
    "cuEventRecord": lambda rig: rig.event.record(rig.stream),
    "cuEventQuery": lambda rig: rig.event.is_done(),
    "cuModuleLoadData": lambda rig: Module.load(rig.driver, b"any"),
    "cuModuleUnload": lambda rig: give_back(rig.module),
    "cuModuleGetFunction": lambda rig: rig.module.function("add"),
    "cuLaunchKernel": lambda rig: rig.add(
        rig.stream, c_uint64(rig.memory.handle), c_uint64(rig.memory.handle), c_uint64(0)
    ),
}


def test_every_call_that_can_fail_is_in_the_table():
    assert set(CALLS) == set(SYMBOLS) - {"cuGetErrorName", "cuGetErrorString"}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_is_named_with_the_error_in_one_sentence(name, rig, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_FAIL", f"cuNothing=1,{name}=700,cuNothing=2")
    with pytest.raises(DriverError) as raised:
        CALLS[name](rig)
    assert str(raised.value) == (
        f"{name} failed with CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered."
    )
    assert raised.value.code == 700
    monkeypatch.delenv("FAKE_CUDA_FAIL")


@pytest.mark.parametrize("code", module._REMEDIES)
def test_where_something_can_be_done_the_error_says_what(code, rig, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_FAIL", f"cuMemAlloc_v2={code}")
    remedy = re.escape(module._REMEDIES[code])
    with pytest.raises(DriverError, match=rf"^cuMemAlloc_v2 failed with CUDA_ERROR_\w+ \({code}\): .+; {remedy}\.$"):
        DeviceMemory.allocate(rig.driver, 1)


def test_an_error_that_the_driver_has_no_name_for_keeps_its_number(rig, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2=4711")
    with pytest.raises(DriverError, match=r"^cuMemAlloc_v2 failed with an error unknown to this driver \(4711\): "):
        DeviceMemory.allocate(rig.driver, 1)


# Closing


@pytest.mark.parametrize("name", ["context", "host", "memory", "stream", "event", "module"])
def test_closing_twice_gives_back_once_and_ends_all_use(name, fake_cuda):
    with ExitStack() as stack:
        rig = Rig(stack, Shared(PAGE))
        resource = getattr(rig, name)
        if name == "context":
            stack.close()  # what was made in it goes first
        resource.close()
        resource.close()
        with pytest.raises(AssertionError, match="is closed"):
            _ = resource.handle


def test_a_borrowed_stream_is_used_and_left_open(rig):
    with Stream.borrow(rig.driver, rig.stream.handle) as borrowed:
        borrowed.write_value(rig.word(0), 5)
    with pytest.raises(AssertionError, match="is closed"):
        borrowed.synchronize()
    rig.stream.synchronize()
    assert rig.shared.words[0] == 5


def test_the_default_stream_can_be_borrowed(rig):
    with Stream.borrow(rig.driver, 0) as default:
        default.write_value(rig.word(0), 6)
        default.synchronize()
    assert rig.shared.words[0] == 6


def test_a_second_thread_makes_the_context_current_first(rig):
    errors = []

    def use() -> None:
        try:
            rig.stream.is_done()
        except DriverError as error:
            errors.append(str(error))
        rig.context.make_current()
        errors.append(rig.stream.is_done())

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(DEADLINE_S)
    assert len(errors) == 2 and "CUDA_ERROR_INVALID_CONTEXT (201)" in errors[0] and errors[1]


# What must not be passed


@pytest.mark.parametrize("what", ["unregistered memory", "the mapped address", "device memory"])
def test_a_copy_takes_only_the_host_address_of_registered_memory(what, rig):
    other = Shared(PAGE)
    bad = {
        "unregistered memory": other.address,
        "the mapped address": rig.host.device_address(),
        "device memory": rig.memory.handle,
    }[what]
    for copy, arguments in (
        (rig.stream.copy_to_device, (rig.memory.handle, bad, 64)),
        (rig.stream.copy_to_host, (bad, rig.memory.handle, 64)),
        (rig.stream.copy_to_device, (rig.host.handle, rig.host.handle, 64)),
        (rig.stream.copy_to_device, (rig.memory.handle, rig.host.handle, rig.shared.size_bytes + 1)),
    ):
        with pytest.raises(DriverError, match=r"CUDA_ERROR_INVALID_VALUE"):
            copy(*arguments)


def test_a_wait_or_write_takes_only_an_address_that_the_device_sees(rig):
    for operation in (rig.stream.wait_value, rig.stream.write_value):
        for bad in (Shared(PAGE).address, rig.host.handle, rig.host.device_address(rig.shared.size_bytes)):
            with pytest.raises(DriverError, match=r"CUDA_ERROR_INVALID_VALUE"):
                operation(bad, 1)


def test_a_kernel_takes_only_addresses_that_the_device_sees(rig):
    with pytest.raises(DriverError, match=r"^cuLaunchKernel failed with CUDA_ERROR_ILLEGAL_ADDRESS"):
        rig.add(rig.stream, c_uint64(rig.memory.handle), c_uint64(rig.host.handle), c_uint64(1))


@pytest.mark.parametrize(("offset", "value"), [(4, 1), (0, -1), (0, 2**63)])
def test_a_value_that_would_be_cut_off_or_turned_around_is_an_assertion(offset, value, rig):
    for operation in (rig.stream.wait_value, rig.stream.write_value):
        with pytest.raises(AssertionError):
            operation(rig.word(0) + offset, value)


# Order


def test_a_stream_works_in_order_though_every_operation_is_delayed(fake_cuda, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_JITTER_US", "60")
    n, count = 8, 100
    with ExitStack() as stack:
        rig = Rig(stack, Shared(8 * PAGE))
        values, seen = rig.shared.floats(n * count).reshape(count, n), rig.shared.floats(n * count, 4 * PAGE)
        values[:] = np.arange(1, count + 1)[:, None]
        for row in range(count):
            at = PAGE + row * n * 4
            rig.stream.copy_to_device(rig.memory.handle, rig.host.handle + at, n * 4)
            rig.stream.copy_to_host(rig.host.handle + 3 * PAGE + at, rig.memory.handle, n * 4)
        rig.stream.synchronize()
        assert rig.stream.is_done()
        np.testing.assert_array_equal(seen, values.ravel())


def test_an_event_holds_one_stream_until_the_other_has_reached_it(rig):
    assert rig.event.is_done()  # not recorded yet
    with Stream.create(rig.driver, priority=-1) as other:
        rig.stream.wait_value(rig.word(0), 1)
        rig.stream.write_value(rig.word(1), 7)
        rig.event.record(rig.stream)
        other.wait_event(rig.event)
        other.write_value(rig.word(2), 8)
        assert not rig.event.is_done() and not rig.stream.is_done() and not other.is_done()
        assert (rig.shared.words[1], rig.shared.words[2]) == (0, 0)
        rig.shared.words[0] = 1
        other.synchronize()
        assert rig.event.is_done()
        assert (rig.shared.words[1], rig.shared.words[2]) == (7, 8)


def test_a_wait_for_an_event_means_the_record_before_it_and_no_later_one(rig):
    with Stream.create(rig.driver) as other:
        rig.event.record(rig.stream)
        other.wait_value(rig.word(0), 1)
        other.wait_event(rig.event)
        rig.stream.wait_value(rig.word(1), 1)
        rig.event.record(rig.stream)
        rig.shared.words[0] = 1
        assert eventually(other.is_done)
        assert not rig.event.is_done()
        rig.shared.words[1] = 1
        rig.stream.synchronize()
        assert rig.event.is_done()


@pytest.mark.parametrize(("word", "value"), [(5, 5), (6, 5), (2**62, 5), (2**63 - 1, 5)])
def test_a_wait_is_over_at_the_value_and_above_it(word, value, rig):
    rig.shared.words[0] = word
    rig.stream.wait_value(rig.word(0), value)
    assert eventually(rig.stream.is_done)


@pytest.mark.parametrize(("word", "value"), [(4, 5), (0, 2**62), (2**64 - 1, 5), (2**63, 0)])
def test_a_wait_holds_below_the_value_and_the_comparison_is_cyclic(word, value, rig):
    rig.shared.words[0], rig.shared.words[1] = word, 1
    rig.stream.wait_value(rig.word(0), value)
    with Stream.create(rig.driver) as other:  # has done as much, so the first has had its chance
        other.wait_value(rig.word(1), 1)
        other.synchronize()
    assert not rig.stream.is_done()
    rig.shared.words[0] = value


def test_synchronizing_leaves_other_threads_running(rig):
    rig.stream.wait_value(rig.word(0), 1)
    timer = threading.Timer(0.02, lambda: rig.shared.words.__setitem__(0, 1))
    timer.start()
    rig.stream.synchronize()  # would hang if it kept the interpreter's lock
    timer.join()


def test_a_copy_that_nobody_waits_for_is_seen_torn(rig, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA_JITTER_US", "20000")
    n = 64
    ones, seen = rig.shared.floats(n), rig.shared.floats(n, 2 * PAGE)
    ones[:], seen[:] = 1, 0
    with Stream.create(rig.driver) as slow:
        slow.copy_to_device(rig.memory.handle, rig.host.handle + PAGE, 4 * n)
        slow.synchronize()
        for _ in range(50):  # once is enough, but a busy machine may sleep through a pause
            seen[:] = 0
            slow.copy_to_host(rig.host.handle + 2 * PAGE, rig.memory.handle, 4 * n)
            while seen[0] == 0:
                pass
            torn = seen[-1] == 0
            slow.synchronize()
            if torn:
                return
    pytest.fail("no copy was seen half done")


# Kernels


def source_of(name: str) -> bytes:
    (file,) = (file for file in FILES if name in declared_in(file))
    return kernels.source(file).encode()


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_launched_by_the_driver_equals_the_operation(name, rig):
    n = 1023
    before = vectors_of(name, None, n, wild_values)
    after, refused = by_the_operation(name, before, WILD)
    lengths = 4096  # bytes from one vector to the next
    host = rig.shared.floats(len(before) * lengths // 4).reshape(len(before), -1)
    addresses = [rig.memory.handle + row * lengths for row in range(len(before))]
    counter = rig.memory.handle + len(before) * lengths
    for row, vector in zip(host, before.values(), strict=True):
        row[:n] = vector
    rig.shared.words[0] = 1000
    rig.stream.copy_to_device(rig.memory.handle, rig.host.handle + PAGE, host.nbytes)
    rig.stream.copy_to_device(counter, rig.host.handle, 8)
    arguments = [*map(c_uint64, addresses), *(c_float(WILD[scalar]) for scalar in KERNELS[name].scalars()), c_uint64(n)]
    arguments += [c_uint64(counter)] * KERNELS[name].is_guarded()
    with Module.load(rig.driver, source_of(name)) as loaded:
        loaded.function(name).launch(rig.stream, 3, 7, *arguments)
        for argument in arguments:
            argument.value = 0  # the launch has copied them
        rig.stream.copy_to_host(rig.host.handle + PAGE, rig.memory.handle, host.nbytes)
        rig.stream.copy_to_host(rig.host.handle, counter, 8)
        rig.stream.synchronize()
    for row, vector in zip(host, after.values(), strict=True):
        assert_same_bits(row[:n].copy(), vector)
    assert rig.shared.words[0] == 1000 + refused


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_a_launch_has_the_blocks_and_threads_asked_for(blocks, threads, rig):
    add, at = rig.module.function("add"), c_uint64(rig.memory.handle)
    with pytest.raises(DriverError, match=r"^cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE"):
        add.launch(rig.stream, blocks, threads, at, at, c_uint64(0))


def test_an_unknown_kernel_is_not_found(rig):
    with pytest.raises(DriverError, match=r"^cuModuleGetFunction failed with CUDA_ERROR_NOT_FOUND \(500\)"):
        rig.module.function("plastic")


# Several processes


@contextmanager
def peer(function: str, fd: int, **arguments: Any) -> Iterator[subprocess.Popen]:
    """A process that calls `function` of this file; killed at the end if it is still there."""
    program = f"import json, sys; from tests.driver_peers import {function} as f; f({fd}, **json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[fd])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def memory() -> Iterator[Callable[[int], int]]:
    """memory(size_bytes): the descriptor of new shared memory."""
    with ExitStack() as stack:

        def make(size_bytes: int) -> int:
            fd = linux.memfd_create("test_driver")
            stack.callback(os.close, fd)
            os.posix_fallocate(fd, 0, size_bytes)
            return fd

        yield make


def test_a_wait_holds_a_stream_until_another_process_writes_the_word(fake_cuda, memory):
    fd = memory(PAGE)
    with ExitStack() as stack:
        rig = Rig(stack, Shared(PAGE, fd))
        rig.stream.wait_value(rig.word(3), 41)
        rig.stream.write_value(rig.word(4), 42)
        assert not rig.stream.is_done()
        with peer("store", fd, index=3, value=40) as process:
            assert process.wait(DEADLINE_S) == 0
        assert not rig.stream.is_done() and rig.shared.words[4] == 0
        with peer("store", fd, index=3, value=41) as process:
            assert process.wait(DEADLINE_S) == 0
        assert eventually(rig.stream.is_done) and rig.shared.words[4] == 42


def test_what_was_copied_before_a_write_is_seen_by_who_waits_for_it(fake_cuda, memory, monkeypatch):
    """Two processes, thousands of blocks: none stale, none torn."""
    monkeypatch.setenv("FAKE_CUDA_JITTER_US", "40")
    count = 3000
    fd = memory(size_bytes(count))
    with peer("consume", fd, count=count, waits=True) as consumer:
        with peer("produce", fd, count=count, waits=True) as producer:
            assert (producer.wait(DEADLINE_S), consumer.wait(DEADLINE_S)) == (0, 0)
    assert wrong_blocks(fd, count) == 0


@pytest.mark.parametrize("careless", ["consume", "produce"])
def test_a_missing_wait_shows_in_every_block_it_should_have_held(careless, fake_cuda, memory):
    """Who does not wait runs to its end before the other starts, so that nothing depends on luck."""
    count = 20
    fd = memory(size_bytes(count))
    for function in (careless, *{"consume", "produce"} - {careless}):
        with peer(function, fd, count=count, waits=function != careless) as process:
            assert process.wait(DEADLINE_S) == 0
    # The consumer finds only zeros; the producer leaves only the last block of each slot.
    assert wrong_blocks(fd, count) == (count if careless == "consume" else count - SLOTS)
