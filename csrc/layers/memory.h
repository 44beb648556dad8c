// Zeroed memory on cache lines of its own; large pieces ask for huge pages, which save the page walks of long strides.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace paraxis {

// Bytes of all such memory in this process: what is computed of a plan is held to it.
inline std::atomic<size_t> reserved_bytes{0};

template <class T>
class Memory {
  public:
    Memory() = default;
    // `dry`: it has a size but no memory, for one who only wants to know how much there would be.
    explicit Memory(size_t count, bool dry = false) : count(count) {
        if (!count || dry) return;
        const size_t bytes = count * sizeof(T), page = bytes >= (2u << 20) ? 2u << 20 : 128u;
        start = static_cast<T*>(std::aligned_alloc(page, (bytes + page - 1) / page * page));
        if (!start) throw std::bad_alloc();
        reserved_bytes += count * sizeof(T);
#if defined(__linux__)
        if (page > 128) madvise(start, bytes, MADV_HUGEPAGE);
#endif
        std::memset(static_cast<void*>(start), 0, bytes);
    }
    Memory(Memory&& other) noexcept : start(other.start), count(other.count), lent(other.lent) { other.start = nullptr; }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(start, other.start);
        std::swap(count, other.count);
        std::swap(lent, other.lent);
        return *this;
    }
    ~Memory() {
        if (lent) return;
        if (start) reserved_bytes -= bytes();
        std::free(start);
    }
    // The same memory under another name; it must not outlive this one.
    Memory lend() const {
        Memory other;
        other.start = start, other.count = count, other.lent = true;
        return other;
    }

    T* data() const { return start; }
    size_t size() const { return count; }
    size_t bytes() const { return lent ? 0 : count * sizeof(T); }
    T& operator[](size_t i) const { return start[i]; }

  private:
    T* start = nullptr;
    size_t count = 0;
    bool lent = false;
};

}  // namespace paraxis
