// What a fork does to a job (a data loader's workers are forks of their rank). The child shares the rank's memory with all ranks, and is
// none of them. So before a fork the rank's tensors are copied aside, and in the child the segment is replaced, at the same address, by a
// private mapping that holds those copies: the child sees its tensors as they were when it was forked, and nothing it does reaches the
// ranks. Parameters and their gradients (Heap::Kind::lasting) are not copied, since they may be as large as the memory: the child reads
// them as they stand. A call that would communicate is a MeshError there, and new tensors come from the process's own memory.
#pragma once

namespace gingham {

class Job;

void watch_forks(Job* job);
void forget_forks(Job* job);

}  // namespace gingham
