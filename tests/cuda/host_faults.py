"""Faults of the host side (streams, events, groups), put into a copy of the sources one at a time; rung 5 must find each.

    PYTHONPATH=tests python -m cuda.host_faults [NAME ...]     prints the table

The copy is built over the fake runtime with the CPU's kernels, once; a fault compiles one file anew. `checks` are tests of pipeline_tests.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

from cuda import fake_build, nvcc
from cuda.mutation import Mutation, Outcome, host
from cuda.mutations import table
from cuda.push_faults import PUSH
from cuda.schedule_faults import SCHEDULE

FOLDER = nvcc.ROOT / "build" / "mutations" / "host"
SECONDS = 40  # a correct run of one check takes 1 to 6
PARTS = ("csrc", "bench", "cmake", "CMakeLists.txt", "tests/csrc", "tests/cuda/fake", "tests/cuda/samegpu")

QUEUED, COPY, INPUT, OUTPUT = "transport/queued.cc", "transport/copy.cc", "ops/input.cc", "ops/output.cc"
RELAY, NCCL = "collectives/resident.h", "transport/nccl.cc"
NCCL_PRODUCTS, JITTER, COPIES, CAPTURE, BYTES, CALLERS, SUMS = (
    "products over nccl",
    "with jitter",
    "products over copies",
    "a step could be captured",
    "bytes are nccl's",
    "on the caller's stream",
    "sums of 16 bits",
)


CAPTURED, REFUSED = "a step is captured", "captures of copies are refused"
PANELS, RINGS, RING_COPIES = "ops/panels.cc", "attention", "attention over copies"
RECEIVED = "    for (const Matrix& m : {to.k, to.v}) ring_.recv(axis_.next(-1), m.data, m.bytes(), kPanelLane);\n"
RECEIVED += "    ring_.group_end();\n"
APART = "    ring_.group_end();\n    ring_.group_start();\n"
END_OF_QUEUED_RING = "  }\n\n private:\n  const Stream& stream_;\n  int lane_;\n  Relay relay_;\n  Scratch"

DEVICE, BESIDE, LEFT = "transport/device.cc", "sums beside the caller", "what an error left is not sent"

FAULTS = [
    *SCHEDULE,
    *PUSH,
    host("work beside does not wait for the caller's", "order", DEVICE, "forked_).hold_back(side_.get());\n", "forked_);\n", BESIDE),
    host("the caller does not wait for work beside", "order", DEVICE, "    joined_.hold_back(native(stream_));\n", "", BESIDE),
    host("a call beside follows the caller", "order", DEVICE, "if (stream && !beside_)", "if (stream)", BESIDE),
    host(
        "work beside is not beside",
        "order",
        DEVICE,
        "    stream_.follow(side_.get());\n    beside_ = unjoined_ = true;\n",
        "    beside_ = unjoined_ = true;\n",
        "sums beside run while the caller does",
    ),
    host(
        "a 16-bit product keeps its sums in fp32",
        "memory",
        "ops/step_call.cc",
        "  return stream.device() == Device::cuda &&",
        "  return false &&",
        SUMS,
    ),
    host(
        "a sum that is not whole is rounded",
        "rounding",
        "ops/backward.cc",
        "      if (dim < 0 && !last) return tail;\n",
        "      (void)last;\n",
        SUMS,
    ),
    host(
        "the caller's stream is not followed",
        "stream",
        "transport/device.cc",
        "    if (stream && !beside_) stream_.follow(static_cast<cudaStream_t>(*stream));\n",
        "    (void)stream;\n",
        CALLERS,
    ),
    host(
        "the default stream is taken for none",
        "stream",
        "transport/device.cc",
        "    if (stream && !beside_) stream_.follow",
        "    if (stream && *stream && !beside_) stream_.follow",
        CALLERS,
    ),
    host("a group does not wait for the kernels before", "event", QUEUED, "  entry.hold_back(line.stream);\n", "", JITTER),
    host(
        "kernels do not wait for what arrives",
        "event",
        QUEUED,
        "  await_group(line, lanes_[static_cast<size_t>(lane)].received);\n",
        "  (void)line;\n",
        JITTER,
        CAPTURE,
    ),
    host(
        "a buffer is used again before it was sent",
        "event",
        QUEUED,
        "  if (sends.size() > left) await_group(line, sends[sends.size() - 1 - left]);\n",
        "  (void)line, (void)sends, (void)left;\n",
        CAPTURE,
        JITTER,
    ),
    host(
        "a send does not wait for its receive", "group", QUEUED, "  if (waiting > left) flush(line);\n", "  flush(line);\n", NCCL_PRODUCTS
    ),
    host(
        "communicators in no order",
        "order",
        QUEUED,
        "  if (after_another) order_.last->hold_back(line.stream, capture);\n",
        "",
        "one communicator at a time",
    ),
    host("bytes received are not counted", "count", QUEUED, "  count_received(bytes, crosses(peer));\n", "", BYTES),
    host(
        "a copy does not wait for its sender",
        "event",
        COPY,
        "  CUDA_CHECK(cudaStreamWaitEvent(stream, event_of(slot.ready), 0));\n",
        "",
        JITTER,
    ),
    host(
        "a sender does not wait until it is taken",
        "event",
        COPY,
        "  CUDA_CHECK(cudaStreamWaitEvent(native(compute()), event_of(channel.slots[(wanted - 1) % kSlots].taken), 0));\n",
        "",
        JITTER,
    ),
    host(
        "a slice is used before it is here",
        "ring",
        INPUT,
        "    if (wanted > 0) ring_.settle(lane_, group_of(slice, wanted));\n",
        "",
        JITTER,
    ),
    host("the last slice is not drained", "ring", INPUT, "    if (slice + 1 == slices()) ring_.drain(axis_.next(), lane_);\n", "", JITTER),
    host(
        "a share goes to the wrong place",
        "ring",
        INPUT,
        "for (int r = 0; r < rank; r++) data +=",
        "for (int r = 0; r <= rank; r++) data +=",
        NCCL_PRODUCTS,
    ),
    host("keys of a hop are used before they are here", "ring", PANELS, "    ring_.arrived(kPanelLane);\n", "", JITTER),
    host(
        "a hop's buffer is used again too early",
        "ring",
        PANELS,
        "    if (hop > kBuffers) ring_.drain",
        "    if (hop < 0) ring_.drain",
        RING_COPIES,
    ),
    host("a hop is sent before it is received", "group", PANELS, RECEIVED, APART + RECEIVED, RINGS),
    host("gradients are added before they are here", "ring", PANELS, "        ring_.arrived(kSumLane);\n", "        (void)0;\n", JITTER),
    host("a partial sum is added before it is here", "ring", OUTPUT, "    if (round_ > 0) axis_.ring().arrived(lane_);\n", "", JITTER),
    host(
        "the ring of sums is left early",
        "ring",
        OUTPUT,
        "    if (slice + 1 == cut_.slices().slices) relay_.drain();\n" + END_OF_QUEUED_RING,
        END_OF_QUEUED_RING,
        JITTER,
    ),
    host(
        "a relay's buffers in the wrong turn", "ring", RELAY, "sent_ - sent_from_[buffer_]);", "sent_ - sent_from_[buffer_] + 1);", JITTER
    ),
    host(
        "messages one byte short",
        "group",
        NCCL,
        "nccl().Send(m.data, m.bytes, ncclInt8",
        "nccl().Send(m.data, m.bytes - 1, ncclInt8",
        NCCL_PRODUCTS,
    ),
    host(
        "waits across the boundary of a capture",
        "capture",
        "transport/queued.h",
        "    if (capture == in_capture) end",
        "    if (capture == in_capture || stream) end",
        CAPTURED,
    ),
    host("a captured event is watched", "capture", QUEUED, "if (oldest.capture || reached", "if (reached", CAPTURED),
    host("the watch is not relaxed", "capture", NCCL, "  cudaThreadExchangeStreamCaptureMode(&mode);\n", "  (void)mode;\n", CAPTURED),
    host(
        "captures of copies are let through",
        "capture",
        COPY,
        "void Copy::allow_capture() {\n",
        "void Copy::allow_capture() {\n  return;\n",
        REFUSED,
    ),
    host(
        "a refused send leaves its group open",
        "group",
        NCCL,
        "    if (open_) nccl().GroupEnd();",
        "    if (open_) return;",
        "a refused send closes its group",
    ),
    host(
        "an axis under way is destroyed",
        "watch",
        NCCL,
        "  while (!axis.idle()) {",
        "  while (!axis.idle() && start < 0) {",
        "a refused send closes its group",
    ),
    host("aborted under a call", "watch", NCCL, "  const std::lock_guard calls(world_.calls_);\n", "", "an abort waits for a call"),
    host(
        "memory is free under messages that an error left",
        "memory",
        "base/cuda_stream.cc",
        "  if (broken_off && std::uncaught_exceptions() > 0) broken_off();\n",
        "",
        "memory outlasts messages",
    ),
    host("an error leaves messages unjoined", "event", QUEUED, "    all.hold_back(stream);\n", "", "memory outlasts messages", LEFT),
    host("an error leaves half a group unjoined", "event", QUEUED, "  order_.last_stream = line.stream;\n  carry", "  carry", LEFT),
    host("an error leaves messages to be sent", "group", QUEUED, "  for (Queued* axis : axes) axis->forget();\n", "", LEFT),
    host(
        "an error leaves work beside unjoined",
        "order",
        DEVICE,
        "      joined_.hold_back(beside_ ? callers_ : native(stream_));\n",
        "",
        LEFT,
    ),
    host(
        "messages' streams wait for the default stream",
        "stream",
        "base/cuda_stream.cc",
        "&stream, cudaStreamNonBlocking,",
        "&stream, cudaStreamDefault,",
        CALLERS,
    ),
    host(
        "a rank does not enter its device",
        "device",
        "base/cuda_stream.h",
        "CUDA_CHECK(cudaSetDevice(ordinal_)); }",
        "(void)ordinal_; }",
        NCCL_PRODUCTS,
    ),
    host(
        "a scope keeps its device",
        "device",
        "transport/device.h",
        "  ~OnDevice() { gpu_.enter(before_); }",
        "  ~OnDevice() { gpu_.enter(gpu_.ordinal()); }",
        "a scope gives the device back",
    ),
    host(
        "one slot too many is written",
        "ring",
        COPY,
        "channel.consumed.load() >= kSlots)",
        "channel.consumed.load() > kSlots)",
        "slots of copies are taken in turn",
    ),
    host(
        "an empty message is received and not sent",
        "group",
        NCCL,
        "    if (m.bytes == 0) continue;",
        "    if (m.bytes == 0 && m.way == Message::Way::send) continue;",
        "some shares are empty",
    ),
    host(
        "a group's wait for kernels is its own",
        "watch",
        QUEUED,
        "(lost || reached(oldest.begin))",
        "(lost || oldest.begin.get())",
        "long kernels are no stall",
    ),
    host(
        "the watch stays with the first group",
        "watch",
        QUEUED,
        "line.seen < line.groups;",
        "line.seen < std::min(line.groups, uint64_t{1});",
        "a late hang is named",
    ),
    host(
        "the pool gives memory back",
        "memory",
        "base/cuda_stream.cc",
        "  keep_freed_memory(ordinal);\n",
        "  if (ordinal < 0) keep_freed_memory(ordinal);\n",
        CAPTURE,
    ),
    host(
        "receives before the group begins",
        "group",
        NCCL,
        "  NcclGroup() { NCCL_CHECK(nccl().GroupStart()); }\n",
        "  NcclGroup() {}\n",
        NCCL_PRODUCTS,
    ),
]


def copied() -> None:
    """The sources in a folder of their own; only what differs is written, so that a build there compiles what changed and no less."""
    for part in PARTS:
        found = nvcc.ROOT / part
        for source in (
            [found] if found.is_file() else [path for path in found.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        ):
            target = FOLDER / source.relative_to(nvcc.ROOT)
            if target.exists() and target.read_bytes() == source.read_bytes():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def finish(command: list[str], environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status (None: no end) and output; the ranks that the program forked end with it."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=SECONDS)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ask(checks: tuple[str, ...]) -> tuple[bool, str]:
    """Whether one of the tests failed, and what it said."""
    build = fake_build.build("cpu", source=FOLDER, folder=FOLDER / "build")
    environment = fake_build.environment(build, FAKE_CUDA_JITTER="300")
    for check in checks:
        code, said = finish([str(build / "pipeline_tests"), check], environment)
        if code is None:
            return True, f"{check}: no end within {SECONDS} s"
        if code:
            failures = [line for line in said.splitlines() if line.startswith("FAIL")]
            return True, failures[0] if failures else f"{check}: exit {code}"
    return False, "not found"


def run(mutation: Mutation) -> Outcome:
    began = time.perf_counter()
    copied()
    path = FOLDER / "csrc" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: {mutation.file} contains {text.count(mutation.old)} times {mutation.old!r}, which must be once")
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        caught, said = ask(mutation.checks)
    except AssertionError as error:  # of the build: a fault that the compiler finds asks no test
        caught, said = False, next((line for line in str(error).splitlines() if "error:" in line), str(error))
    finally:
        path.write_text(text)
    return Outcome(mutation, caught, said, time.perf_counter() - began)


def unchanged() -> tuple[bool, str]:
    """The same tests on the sources as they are: nothing may be found."""
    copied()
    return ask(tuple(dict.fromkeys(check for fault in FAULTS for check in fault.checks)))


def main(names: list[str]) -> int:
    outcomes = []
    for mutation in FAULTS:
        if not names or mutation.name in names:
            outcomes.append(run(mutation))
            print(f"{mutation.name}: {outcomes[-1].said} ({outcomes[-1].seconds:.1f} s)", flush=True)
    print(table(outcomes))
    return sum(not outcome.caught for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
