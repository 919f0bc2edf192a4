#include "engine/arena.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <stdexcept>

#include "engine/config.h"
#include "engine/error.h"

namespace fiedler {

namespace {

constexpr std::size_t round_up(std::size_t bytes) {
    return (bytes + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign;
}

std::string shape_text(const std::vector<std::int64_t>& shape) { return fmt::format("{}", fmt::join(shape, " x ")); }

std::string size_text(std::size_t bytes) { return bytes_text(static_cast<std::int64_t>(bytes)); }

// "layers.3.mlp.u" -> "layers.*.mlp.u": the blocks of all layers share a line.
std::string family_of(const std::string& name) {
    std::string out;
    for (std::size_t i = 0; i < name.size();) {
        const std::size_t end = std::min(name.find('.', i), name.size());
        const std::string part = name.substr(i, end - i);
        const bool number = !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
        out += number ? "*" : part;
        if (end < name.size()) out += '.';
        i = end + 1;
    }
    return out;
}

// Bytes of the whole block, or none when that is not a number of bytes.
bool total_bytes(const std::vector<std::int64_t>& shape, std::size_t size, std::size_t& bytes) {
    bytes = size;
    bool empty = shape.empty();
    for (const std::int64_t n : shape) {
        if (n < 0) return false;
        if (n == 0)
            empty = true;
        else if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(n), &bytes))
            return false;
    }
    if (empty) bytes = 0;
    return bytes < (std::size_t{1} << 60);
}

struct Row {
    std::string name, shape, dtype;
    Lifetime lifetime;
    int count = 0;
    std::size_t bytes = 0;
};

// Blocks of one family, shape, type and lifetime in one row, in order of first appearance.
std::vector<Row> rows_of(const std::vector<Arena::Block>& blocks) {
    std::vector<Row> rows;
    std::map<std::string, std::size_t> index;
    for (const Arena::Block& b : blocks) {
        Row row{family_of(b.name), shape_text(b.shape), b.dtype, b.lifetime};
        const auto [at, fresh] = index.try_emplace(
            fmt::format("{}|{}|{}|{}", row.name, row.shape, row.dtype, int(row.lifetime)), rows.size());
        if (fresh) rows.push_back(row);
        rows[at->second].count += 1;
        rows[at->second].bytes += round_up(b.bytes);
    }
    return rows;
}

}  // namespace

const char* name_of(Lifetime l) {
    constexpr const char* names[] = {"persistent", "saved", "recomputed", "scratch"};
    return names[static_cast<int>(l)];
}

Arena::Scope::Scope(Arena& arena) : arena_(&arena), depth_(arena.scopes_.size()) {
    arena.check_usable();
    arena.scopes_.push_back({arena.cursor_, arena.alive_.size()});
}
void Arena::Scope::close() {
    if (!arena_) throw std::logic_error("arena: a scope is closed twice");
    Arena* arena = arena_;
    arena_ = nullptr;
    arena->close_scope(depth_);
}
Arena::Scope::~Scope() {
    if (!arena_) return;
    if (arena_->scopes_.size() == depth_ + 1)
        arena_->close_scope(depth_);
    else
        arena_->broken_ = true;
}

Arena::~Arena() {
    if (base_ && release_) release_(base_);
}

void Arena::check_usable() const {
    if (broken_) throw std::logic_error("arena: scopes were closed out of order");
}

void Arena::close_scope(std::size_t depth) {
    if (scopes_.size() != depth + 1) {
        broken_ = true;
        throw std::logic_error("arena: a scope is closed while a later one is open");
    }
    cursor_ = scopes_.back().cursor;
    alive_.resize(scopes_.back().alive);
    scopes_.pop_back();
}

void* Arena::take_bytes(const std::string& name, const char* dtype, std::size_t size,
                        const std::vector<std::int64_t>& shape, Lifetime lifetime) {
    check_usable();
    std::size_t bytes = 0;
    if (!total_bytes(shape, size, bytes))
        throw std::logic_error(fmt::format("arena: block {} of shape {} has no size", name, shape_text(shape)));
    if (bytes == 0) return nullptr;
    const Block block{name, dtype, shape, lifetime, cursor_, bytes};
    if (committed_)
        replay_block(block);
    else
        plan_block(block);
    cursor_ += round_up(bytes);
    // The dry run's null base is 256, not 0: a view at offset 0 must not look absent.
    return committed_ ? static_cast<char*>(base_) + block.offset : reinterpret_cast<void*>(kAlign + block.offset);
}

void Arena::plan_block(Block block) {
    alive_.push_back(blocks_.size());
    const std::size_t end = block.offset + round_up(block.bytes);
    blocks_.push_back(std::move(block));
    if (end > peak_) {
        peak_ = end;
        peak_alive_ = alive_;
    }
}

void Arena::replay_block(const Block& block) {
    if (replayed_ == blocks_.size())
        throw std::logic_error(
            fmt::format("arena: block {} was not planned: it is taken after the commit", block.name));
    const Block& planned = blocks_[replayed_];
    if (block.name != planned.name || block.dtype != planned.dtype || block.shape != planned.shape ||
        block.offset != planned.offset)
        throw std::logic_error(fmt::format("arena: block {} ({} {} at {}) was planned as {} ({} {} at {})", block.name,
                                           shape_text(block.shape), block.dtype, block.offset, planned.name,
                                           shape_text(planned.shape), planned.dtype, planned.offset));
    ++replayed_;
}

void Arena::commit(const Memory& memory, std::size_t budget) {
    check_usable();
    if (const std::string short_by = shortage(budget); budget && !short_by.empty()) throw InputError(short_by);
    void* base = peak_ ? memory.allocate(peak_) : nullptr;
    try {
        commit(base);
    } catch (...) {
        if (base) memory.release(base);
        throw;
    }
    release_ = memory.release;
}

void Arena::commit(void* base) {
    check_usable();
    if (committed_) throw std::logic_error("arena: committed twice");
    if (!scopes_.empty()) throw std::logic_error("arena: committed inside a scope");
    if (peak_ && (!base || reinterpret_cast<std::uintptr_t>(base) % kAlign != 0))
        throw std::logic_error("arena: its memory is not 256-byte aligned");
    base_ = base;
    committed_ = true;
    cursor_ = 0;
    alive_.clear();
}

std::vector<const Arena::Block*> Arena::alive_at_peak() const {
    std::vector<const Block*> alive;
    for (const std::size_t i : peak_alive_) alive.push_back(&blocks_[i]);
    return alive;
}

std::size_t Arena::bytes_at_peak(Lifetime lifetime) const {
    std::size_t bytes = 0;
    for (const Block* b : alive_at_peak())
        if (b->lifetime == lifetime) bytes += round_up(b->bytes);
    return bytes;
}

std::string Arena::table() const {
    const std::vector<Row> rows = rows_of(blocks_);
    std::size_t name_width = 4, shape_width = 5;
    for (const Row& r : rows) {
        name_width = std::max(name_width, r.name.size());
        shape_width = std::max(shape_width, r.shape.size());
    }
    const auto share = [&](std::size_t bytes) { return peak_ ? 100.0 * double(bytes) / double(peak_) : 0.0; };
    std::string out = fmt::format("{:<{}}  {:>5}  {:>{}}  {:<5}  {:<10}  {:>10}  {:>6}\n", "name", name_width, "times",
                                  "shape", shape_width, "dtype", "lifetime", "bytes", "share");
    for (const Row& r : rows)
        out += fmt::format("{:<{}}  {:>5}  {:>{}}  {:<5}  {:<10}  {:>10}  {:>5.1f}%\n", r.name, name_width, r.count,
                           r.shape, shape_width, r.dtype, name_of(r.lifetime), size_text(r.bytes), share(r.bytes));
    out += fmt::format("\npeak {} ({} bytes)", size_text(peak_), peak_);
    for (const Lifetime l : {Lifetime::persistent, Lifetime::saved, Lifetime::recomputed, Lifetime::scratch})
        if (const std::size_t bytes = bytes_at_peak(l); bytes)
            out += fmt::format(", {} {} ({:.1f}%)", name_of(l), size_text(bytes), share(bytes));
    return out + "\n";
}

std::string Arena::shortage(std::size_t budget) const {
    if (peak_ <= budget) return "";
    std::vector<Block> alive;
    for (const Block* b : alive_at_peak()) alive.push_back(*b);
    std::vector<Row> rows = rows_of(alive);
    std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.bytes > b.bytes; });
    std::string largest;
    for (std::size_t i = 0; i < rows.size() && i < 3; ++i)
        largest += fmt::format("{}{} {}", i ? ", " : "", rows[i].name, size_text(rows[i].bytes));
    return fmt::format("memory-budget: the plan needs {}, {} more than the budget of {}; largest: {}", size_text(peak_),
                       size_text(peak_ - budget), size_text(budget), largest);
}

}  // namespace fiedler
