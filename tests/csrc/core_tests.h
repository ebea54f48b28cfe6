// What the core's tests share: a test is a name and a function that throws.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "cases.h"

namespace gingham {

struct Failure : Error {
  using Error::Error;
};
#define EXPECT(cond) CHECK(Failure, cond, "line ", __LINE__, ": " #cond)

struct Test {
  const char* name;
  std::function<void()> body;
};

std::vector<int> everyone(int n);
Call named(const char* name, int64_t k = 0, int64_t rows = -1);
// Runs body on every rank, as threads, and gives back what each threw ("" for none).
std::vector<std::string> errors_of(int size, const RankBody& body, double timeout = 5);
bool has(const std::string& text, const char* part);

std::vector<Test> attention_tests();
std::vector<Test> engine_tests();
std::vector<Test> hosts_error_tests();
std::vector<Test> hosts_tests();
std::vector<Test> kernel_tests();
std::vector<Test> mailbox_tests();
std::vector<Test> memory_tests();
std::vector<Test> verdict_tests();

}  // namespace gingham
