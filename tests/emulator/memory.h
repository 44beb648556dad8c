#pragma once
// Memory of the emulated devices, and memory of the host that they copy from and to without waiting.

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace {

constexpr size_t page = 4096, grain = 512;
constexpr int most = 8;
std::recursive_mutex gate;  // one kernel at a time

struct Stats {
  size_t allocated = 0, peak = 0, limit = size_t(80) << 30;
};
Stats stats[most];
int devices = 1;
thread_local int current = 0;
thread_local bool aside = false;  // this thread works beside what others capture

bool touched = false, inherited = false;  // CUDA has been used in this process, or was before it was forked
const int forks = pthread_atfork(nullptr, nullptr, [] { inherited = touched; });

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Block {
  size_t bytes;  // as asked for, rounded up to `grain`
  int device;
  int64_t pool;  // of captures, or -1
  int open = 0;
};
std::map<char*, Block> blocks;                         // of the devices, by address
std::map<char*, size_t> pinned;                        // of the host
std::map<int64_t, std::multimap<size_t, char*>> idle;  // what pools keep for their next capture
std::multimap<size_t, char*> spare;                    // pages of nobody, by their size

int64_t pool_of_capture();  // -1: nothing is captured

struct Now {  // another device is the current one, for a while
  int before = current;
  explicit Now(int device) { current = device; }
  ~Now() { current = before; }
};

std::pair<char* const, Block>& block_at(const void* where) {
  auto found = blocks.upper_bound((char*)where);
  TORCH_CHECK(found != blocks.begin(), "an illegal memory access was encountered");
  --found;
  TORCH_CHECK((char*)where < found->first + found->second.bytes, "an illegal memory access was encountered");
  return *found;
}

// What a kernel may touch, while it lasts.
struct Opened {
  std::vector<char*> own;
  void open(const void* where) {
    if (!where) return;
    auto& [base, block] = block_at(where);
    if (block.open++ == 0) mprotect(base, up(block.bytes, page), PROT_READ | PROT_WRITE);
    own.push_back(base);
  }
  ~Opened() {
    for (char* base : own) {
      auto found = blocks.find(base);
      if (found != blocks.end() && --found->second.open == 0)
        mprotect(base, up(found->second.bytes, page), PROT_NONE);
    }
  }
};

void spoil(char* where, size_t bytes) {
  Opened opened;
  opened.open(where);
  std::memset(where, 0xff, bytes);
}

void give_back(char* where) {
  Block block = blocks.at(where);
  stats[block.device].allocated -= block.bytes;
  spare.emplace(up(block.bytes, page), where);
  blocks.erase(where);
}

void release(void* where) {
  if (!where) return;
  std::lock_guard lock(gate);
  Block& block = blocks.at((char*)where);
  if (block.pool >= 0)
    idle[block.pool].emplace(block.bytes, (char*)where);
  else
    give_back((char*)where);
}

// Of a pool whose captures are all gone.
void release_pool(int64_t pool) {
  for (auto& [bytes, where] : idle[pool]) give_back(where);
  idle.erase(pool);
  for (auto& [where, block] : blocks)
    if (block.pool == pool) block.pool = -1;
}

// Pages that nobody may touch; new ones cost more than those that somebody has given back.
char* pages(size_t bytes) {
  auto found = spare.find(bytes);
  if (found != spare.end()) {
    char* where = found->second;
    spare.erase(found);
    return where;
  }
  void* where = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(where != MAP_FAILED, "the host has no memory for the device");
  return (char*)where;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard lock(gate);
    c10::Device device(c10::DeviceType::CUDA, current);
    touched = true;
    TORCH_CHECK(!inherited, "Cannot re-initialize CUDA in forked subprocess");
    if (n == 0) return {nullptr, nullptr, &release, device};
    size_t bytes = up(n, grain);
    int64_t pool = pool_of_capture();
    if (pool >= 0) {
      auto found = idle[pool].find(bytes);
      if (found != idle[pool].end()) {
        char* where = found->second;
        idle[pool].erase(found);
        return {where, where, &release, device};
      }
    }
    Stats& own = stats[current];
    if (own.allocated + bytes > own.limit)
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ",
                       current, " has ", own.limit, " bytes allowed, ", own.allocated, " of them allocated.");
    char* where = pages(up(bytes, page));
    blocks[where] = {bytes, current, pool};
    own.allocated += bytes;
    own.peak = std::max(own.peak, own.allocated);
    spoil(where, bytes);
    return {where, where, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override {
    std::lock_guard lock(gate);
    Opened opened;
    opened.open(to);
    opened.open(from);
    std::memcpy(to, from, n);
  }
};
Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory)

void unpin(void* where) {
  std::lock_guard lock(gate);
  pinned.erase((char*)where);
  std::free(where);
}

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard lock(gate);
    void* where = std::aligned_alloc(64, up(std::max<size_t>(n, 1), 64));
    std::memset(where, 0xff, n);
    pinned[(char*)where] = n;
    return {where, where, &unpin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Pinned pinned_memory;

bool is_pinned(const void* where) {
  std::lock_guard lock(gate);
  auto found = pinned.upper_bound((char*)where);
  if (found == pinned.begin()) return false;
  --found;
  return (char*)where < found->first + std::max<size_t>(found->second, 1);
}

}  // namespace
