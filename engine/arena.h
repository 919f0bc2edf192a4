// engine/arena.h: every byte of a run, planned before it is allocated.
//
//   Arena arena;
//   Layout(arena);                              dry run: addresses on a null base, never to be read or written
//   arena.peak(), arena.table()                 what it will need, by name
//   arena.commit(memory_of(device), budget);    ONE allocation; InputError when the peak exceeds the budget
//   Layout layout(arena);                       the same calls again: take() gives the real addresses
//
// Blocks are 256-byte aligned. Blocks taken inside a scope end with it, and later blocks use their memory again; scopes
// close in the reverse order of opening. Calls that break these rules, or a second run that differs from the first, are
// programming errors: std::logic_error. A block of no elements takes no memory and has no address (nullptr, which is an
// absent view).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/view.h"

namespace fiedler {

enum class Lifetime { persistent, saved, recomputed, scratch };
const char* name_of(Lifetime);

template <class T>
constexpr const char* dtype_name() {
    if constexpr (std::is_same_v<T, bf16>)
        return "bf16";
    else if constexpr (std::is_same_v<T, float>)
        return "f32";
    else if constexpr (std::is_same_v<T, double>)
        return "f64";
    else if constexpr (std::is_same_v<T, std::int32_t>)
        return "i32";
    else if constexpr (std::is_same_v<T, std::uint32_t>)
        return "u32";
    else if constexpr (std::is_same_v<T, std::int64_t>)
        return "i64";
    else
        return "bytes";
}

// Where an arena gets its memory and gives it back. allocate throws when there is none; addresses are 256-byte aligned.
struct Memory {
    std::function<void*(std::size_t)> allocate;
    std::function<void(void*)> release;
};
template <class Dev>
Memory memory_of(const Dev& dev) {  // dev must outlive the arena
    return {[&dev](std::size_t bytes) { return device_alloc(dev, bytes); }, [&dev](void* p) { device_free(dev, p); }};
}

class Arena {
  public:
    static constexpr std::size_t kAlign = 256;

    struct Block {
        std::string name, dtype;
        std::vector<std::int64_t> shape;
        Lifetime lifetime = Lifetime::persistent;
        std::size_t offset = 0, bytes = 0;  // bytes as asked for; the next block begins at a multiple of 256
    };

    // Ends the lifetime of the blocks taken since it was opened. close() throws when a later scope is still open; the
    // destructor cannot, so it leaves the arena unusable instead.
    class Scope {
      public:
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;
        ~Scope();
        void close();

      private:
        friend class Arena;
        explicit Scope(Arena& arena);
        Arena* arena_;
        std::size_t depth_;
    };

    Arena() = default;
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    template <class T>
    T* take(const std::string& name, const std::vector<std::int64_t>& shape, Lifetime lifetime) {
        return static_cast<T*>(take_bytes(name, dtype_name<T>(), sizeof(T), shape, lifetime));
    }
    template <class T>
    Vec<T> vec(const std::string& name, std::int64_t size, Lifetime lifetime) {
        return {take<T>(name, {size}, lifetime), size};
    }
    template <class T>
    Mat<T> mat(const std::string& name, std::int64_t rows, std::int64_t cols, Lifetime lifetime) {
        return {take<T>(name, {rows, cols}, lifetime), rows, cols};
    }
    [[nodiscard]] Scope scope() { return Scope(*this); }

    // Ends the dry run. budget 0: no limit.
    void commit(const Memory&, std::size_t budget = 0);
    // The same on memory of at least peak() bytes that the caller owns.
    void commit(void* base);

    bool committed() const { return committed_; }
    // Has the second run made every call of the first?
    bool complete() const { return committed_ && replayed_ == blocks_.size() && scopes_.empty(); }
    std::size_t peak() const { return peak_; }
    void* base() const { return base_; }
    const std::vector<Block>& blocks() const { return blocks_; }
    std::vector<const Block*> alive_at_peak() const;
    std::size_t bytes_at_peak(Lifetime) const;

    // The plan for people: a line per block ("layers.*.x 12 times" for a layer's blocks), share of the peak, totals.
    std::string table() const;
    // "needs 25.1 GiB, 1.1 GiB more than the budget of 24.0 GiB; largest: ...", or "" when it fits.
    std::string shortage(std::size_t budget) const;

  private:
    void* take_bytes(const std::string& name, const char* dtype, std::size_t size,
                     const std::vector<std::int64_t>& shape, Lifetime);
    void check_usable() const;
    void plan_block(Block);
    void replay_block(const Block&);
    void close_scope(std::size_t depth);

    struct OpenScope {
        std::size_t cursor, alive;
    };
    std::vector<Block> blocks_;                    // in the order of the calls
    std::vector<std::size_t> alive_, peak_alive_;  // indices into blocks_
    std::vector<OpenScope> scopes_;
    std::size_t cursor_ = 0, peak_ = 0, replayed_ = 0;
    bool committed_ = false, broken_ = false;
    void* base_ = nullptr;
    std::function<void(void*)> release_;
};

}  // namespace fiedler
