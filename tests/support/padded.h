// tests/support/padded.h: a matrix in a wider buffer. The columns after each row belong to others and must stay as they
// are: NaN, the poison of tests/support/buffer.h.
#pragma once
#include "tests/support/buffer.h"

namespace fiedler::test {

template <class T, class Dev>
struct Padded {
    std::int64_t rows, cols, ld;
    Buffer<T, Dev> buffer;

    Padded(const Dev& dev, std::int64_t r, std::int64_t c, std::int64_t stride)
        : rows(r), cols(c), ld(stride), buffer(dev, static_cast<std::size_t>(r * stride)) {}
    Padded(const Dev& dev, std::int64_t r, std::int64_t c, std::int64_t stride, const Values& v)
        : Padded(dev, r, c, stride) {
        std::vector<T> all = buffer.host();
        for (std::int64_t i = 0; i < r; ++i)
            for (std::int64_t j = 0; j < c; ++j) all[std::size_t(i * ld + j)] = narrow<T>(v[std::size_t(i * c + j)]);
        copy_to_device(dev, buffer.data(), all.data(), buffer.bytes());
    }
    Mat<T> mat() const { return {buffer.data(), rows, cols, ld}; }
    // The values, after a look at the padding.
    Values values() const {
        const Values all = buffer.values();
        Values v;
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t j = 0; j < ld; ++j) {
                const double value = all[std::size_t(i * ld + j)];
                if (j < cols)
                    v.push_back(value);
                else
                    EXPECT_TRUE(std::isnan(value)) << "padding written at row " << i << ", column " << j;
            }
        return v;
    }
};

}  // namespace fiedler::test
