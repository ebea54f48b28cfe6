// Links that have gone silent, seen in the kernel's own account of UCX's TCP sockets. TCP_USER_TIMEOUT would tell them too, but also drops a
// peer that is stopped for as long (a debugger, a virtual machine that is moved), whose kernel still answers: its window is full, not its link cut.
//   sent, not acknowledged, 4 times sent again without an answer (3 s, where the round trip is short)  ->  shut down, which UCX reports
#pragma once

namespace gingham {

// Shuts down the TCP sockets below an epoll descriptor (also those of epoll descriptors in it) that are silent; how many these were.
int shut_silent_links(int epoll);

}  // namespace gingham
