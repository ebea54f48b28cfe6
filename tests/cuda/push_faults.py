"""Faults of messages by copy engines: flags, slots, rounds, what leaves before its time. Part of host_faults."""

from cuda.mutation import host

PUSH_CC, QUEUED, NCCL = "transport/push.cc", "transport/queued.cc", "transport/nccl.cc"
MESSAGES, BEHIND, GRAPH = "messages by copy engines", "copy engines behind each other", "copy engines in a graph"
WRITTEN_OVER = "what copy engines sent is written over"
RELEASED, CANNOT = "what copy engines wait for is let go", "copy engines that cannot"
LEFT = "  left_.hold_back(in_);\n  return in_;\n"
TAKE = "  memory.take(stream, on_device(sends ? flag.open : flag.full), flush_);\n"

PUSH = [
    host("a flag is not cleared", "flag", PUSH_CC, "    run(stream, 2, both);\n", "    run(stream, 1, both);\n", MESSAGES),
    host(
        "a slot is full before it is filled",
        "flag",
        PUSH_CC,
        TAKE,
        TAKE + "  if (sends) memory.set(stream, on_device(flag.full));\n",
        MESSAGES,
    ),
    host(
        "a slot is filled before it is open",
        "flag",
        PUSH_CC,
        TAKE,
        "  if (!sends) memory.take(stream, on_device(flag.full), flush_);\n",
        MESSAGES,
    ),
    host(
        "slots do not take turns",
        "slot",
        PUSH_CC,
        "(*counted_)[2 * channel + sends]++ % kSlots",
        "(*counted_)[2 * channel + sends]++ % 1",
        GRAPH,
    ),
    host(
        "lines share their slots",
        "slot",
        PUSH_CC,
        "window + (channel * kSlots + number)",
        "window + (channel / 2 * kSlots + number)",
        MESSAGES,
    ),
    host("what comes does not wait for what leaves", "order", QUEUED, LEFT, "  return in_;\n", GRAPH),
    host("what leaves is far ahead", "order", QUEUED, "  if (rounds_ >= kAhead) came_[", "  if (rounds_ >= 9999) came_[", GRAPH),
    host("a group ends before all has left", "order", QUEUED, LEFT, "  return in_;\n", WRITTEN_OVER),
    host("streams stay behind in a capture", "capture", QUEUED, "  if (by_engines_ && capture) engines().join();\n", "", GRAPH),
    host("what leaves does not wait for kernels", "order", QUEUED, "  engines().hold_back_leaving(entry);\n", "", MESSAGES, GRAPH),
    host(
        "what came is handed on too early",
        "order",
        QUEUED,
        "    if (brought) hold_back_leaving(*trail.group, capture);\n",
        "    (void)brought, (void)capture;\n",
        MESSAGES,
    ),
    host(
        "rounds of another capture are waited for",
        "capture",
        QUEUED,
        "  if (capture_ != in_capture) rounds_ = 0;  // see Group\n",
        "",
        GRAPH,
    ),
    host("nobody lets go what is waited for", "abort", NCCL, "push->release();\n    }\n", "(void)push;\n    }\n", RELEASED),
    host(
        "a replay is taken for an end",
        "abort",
        NCCL,
        "    for (; !stop_.load(); ",
        "    for (; !stop_.load() && !axes_[0]->idle(); ",
        "a replay is let go",
    ),
    host(
        "the start-up check compares nothing",
        "check",
        PUSH_CC,
        "return each == value(from, rank_); }))",
        "return each != 0 || value(from, rank_); }))",
        CANNOT,
    ),
    host(
        "a rank that cannot goes alone",
        "check",
        PUSH_CC,
        "    all &= theirs.able[step] == 1;\n",
        "    all &= shown(rank_).able[step] == 1;\n",
        CANNOT,
    ),
]
