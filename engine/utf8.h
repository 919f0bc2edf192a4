// engine/utf8.h: UTF-8 as the Unicode standard defines it: no overlong forms, no surrogates, nothing above U+10FFFF.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace fiedler {

inline bool is_utf8_continuation(char c) { return (static_cast<unsigned char>(c) & 0xc0) == 0x80; }

// Bytes of the sequence at text[at]: 1..4 when valid, 0 when invalid, -1 when valid so far but cut off by the end.
inline int utf8_sequence(std::string_view text, std::size_t at) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const unsigned char lead = byte(0);
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return 0;
    const int length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
    const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; ++i) {
        if (at + static_cast<std::size_t>(i) >= text.size()) return -1;
        const unsigned char b = byte(static_cast<std::size_t>(i));
        if (i == 1 ? b < low || b > high : b < 0x80 || b > 0xbf) return 0;
    }
    return length;
}

// Offset of the first byte that is not valid UTF-8; npos when all is well.
inline std::size_t find_invalid_utf8(std::string_view text) {
    std::size_t at = 0;
    while (at < text.size()) {
        std::uint64_t word;
        while (at + sizeof word <= text.size()) {  // runs of ASCII, eight bytes at a time
            std::memcpy(&word, text.data() + at, sizeof word);
            if (word & 0x8080808080808080ull) break;
            at += sizeof word;
        }
        if (at >= text.size()) break;
        const int length = utf8_sequence(text, at);
        if (length <= 0) return at;
        at += static_cast<std::size_t>(length);
    }
    return std::string_view::npos;
}

// The largest position <= at that does not lie inside a sequence of (valid) text.
inline std::size_t utf8_floor(std::string_view text, std::size_t at) {
    if (at >= text.size()) return text.size();
    while (at > 0 && is_utf8_continuation(text[at])) --at;
    return at;
}

}  // namespace fiedler
