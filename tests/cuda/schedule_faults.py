"""Faults of what is queued when: weights gathered early, sums that meet their products. Part of host_faults."""

from cuda.mutation import host

QUEUED, INPUT, OUTPUT = "transport/queued.cc", "ops/input.cc", "ops/output.cc"
EARLY, SAME_BITS, MEANWHILE = "weights gathered early", "early weights change no bits", "early weights come while the caller computes"
JITTER = "with jitter"
SETTLE = "    if (call_.early) call_.early->settle();\n"
END_OF_ADDING = "  }\n\n private:\n  Ring& ring_;\n  const Stream& stream_;\n  int lane_;\n  Matrix rounded_;"

SCHEDULE = [
    host("Y is made of a W that is not here yet", "order", "ops/forward.cc", SETTLE, "", EARLY),
    host("dX is made of a W that is not here yet", "order", "ops/backward.cc", SETTLE, "", EARLY),
    host(
        "an early gather waits for nothing",
        "order",
        QUEUED,
        "  entry.hold_back(line.stream);\n",
        "  if (!after_) entry.hold_back(line.stream);\n",
        EARLY,
    ),
    host(
        "an early gather waits for all that is queued",
        "order",
        QUEUED,
        "  after_ = &static_cast<const QueuedPoint&>(after).event;\n",
        "  (void)after;\n",
        MEANWHILE,
    ),
    host(
        "early parts count as standing",
        "order",
        INPUT,
        "  int distance(int interval) const override { return hops(cut_.axis(), cut_.owner(interval)); }\n",
        "",
        SAME_BITS,
    ),
    host(
        "a product is added to a sum that is not here yet",
        "ring",
        OUTPUT,
        "    if (round > 0)\n      ring_.arrived(lane_);\n",
        "    if (round > 0)\n      (void)0;\n",
        JITTER,
    ),
    host(
        "messages of added sums are left early",
        "ring",
        OUTPUT,
        "    if (slice + 1 == cut_.slices().slices) relay_.drain();\n" + END_OF_ADDING,
        END_OF_ADDING,
        JITTER,
        "a step could be captured",
    ),
]
