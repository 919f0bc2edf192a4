// engine/byte_reader.h: a cursor over bytes that may lie about themselves. Nothing is read beyond the end: what is not
// there is an InputError of the form "FILE: is truncated or corrupt: WHAT".
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "engine/error.h"

namespace fiedler {

class ByteReader {
  public:
    ByteReader(std::string_view bytes, std::string name) : bytes_(bytes), name_(std::move(name)) {}
    std::size_t left() const { return bytes_.size() - at_; }
    std::size_t at() const { return at_; }
    bool done() const { return left() == 0; }
    [[noreturn]] void fail(std::string_view what) const {
        input_error("{}: is truncated or corrupt: {} at byte {}; copy it again", name_, what, at_);
    }
    std::string_view take(std::uint64_t count, std::string_view what) {
        if (count > left()) fail(what);
        const std::string_view piece = bytes_.substr(at_, static_cast<std::size_t>(count));
        at_ += piece.size();
        return piece;
    }
    template <class T>
    T number(std::string_view what) {
        T value;
        std::memcpy(&value, take(sizeof(T), what).data(), sizeof(T));
        return value;
    }
    // A number of Protocol Buffers: seven bits a byte, low ones first.
    std::uint64_t varint(std::string_view what) {
        std::uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            const auto byte = number<std::uint8_t>(what);
            value |= std::uint64_t(byte & 127u) << shift;
            if (byte < 128) return value;
        }
        fail(what);
    }

  private:
    std::string_view bytes_;
    std::string name_;
    std::size_t at_ = 0;
};

}  // namespace fiedler
