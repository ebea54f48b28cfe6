// One binary for every machine: a function marked VECTORISED is compiled for AVX-512, AVX2 and the baseline, and the loader picks. Not
// under sanitizers, whose runtime is not up yet when the loader asks.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
