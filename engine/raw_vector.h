// engine/raw_vector.h: vectors for large results, whose elements are not set when they are made: resize() touches no
// memory, so that the threads that fill it are the first to, each its own pages. Large ones ask for huge pages.
#pragma once
#include <algorithm>
#include <cstddef>
#include <new>
#include <vector>

namespace fiedler {

void* raw_memory(std::size_t bytes);  // std::bad_alloc when there is not enough; graph.cpp
void free_raw_memory(void* p) noexcept;

template <class T>
struct RawAllocator {
    using value_type = T;
    RawAllocator() = default;
    template <class U>
    RawAllocator(const RawAllocator<U>&) {}
    T* allocate(std::size_t n) { return static_cast<T*>(raw_memory(n * sizeof(T))); }
    void deallocate(T* p, std::size_t) noexcept { free_raw_memory(p); }
    template <class U>
    void construct(U* p) {
        ::new (static_cast<void*>(p)) U;  // not U(): left as it is
    }
    template <class U, class... Args>
    void construct(U* p, Args&&... args) {
        ::new (static_cast<void*>(p)) U(static_cast<Args&&>(args)...);
    }
    bool operator==(const RawAllocator&) const { return true; }
};
template <class T>
using RawVector = std::vector<T, RawAllocator<T>>;

template <class T>
bool operator==(const RawVector<T>& a, const std::vector<T>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
}
template <class T>
bool operator==(const std::vector<T>& a, const RawVector<T>& b) {
    return b == a;
}

}  // namespace fiedler
