// Links that have gone silent, seen in the kernel's own account of an engine's TCP sockets. TCP_USER_TIMEOUT would tell them too, but also drops a
// peer that is stopped for as long (a debugger, a virtual machine that is moved), whose kernel still answers: its window is full, not its link cut.
//   sent, not acknowledged, 4 times sent again without an answer (3 s, where the round trip is short)  ->  shut down, which the engine reports
#pragma once

namespace gingham {

// Shuts down the TCP sockets below an epoll descriptor (also those of epoll descriptors in it) that are silent; how many these were.
int shut_silent_links(int epoll);

// Shuts down all of them: whoever waits for a message on one is told that it broke.
void shut_links(int epoll);

// Lets the kernel ask on those that are idle whether the peer's kernel is there: after 1 s, each second, 3 times.
void keep_links_alive(int epoll);

}  // namespace gingham
