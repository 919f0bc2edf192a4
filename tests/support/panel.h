// tests/support/panel.h: a matrix that is some columns of a wider one, as in a solver's blocks. The columns of others
// before and after it hold NaN, which spoils whatever reads them, and large numbers by turns, for a NaN stays NaN
// whatever is done to it. values() looks whether they are still there.
#pragma once
#include <limits>

#include "tests/support/buffer.h"

namespace fiedler::test {

struct Place {
    std::int64_t before = 0, after = 0;  // columns of others
};

template <class T, class Dev>
class Panel {
  public:
    Panel(const Dev& dev, std::int64_t rows, std::int64_t cols, Place place, const Values& v = {})
        : rows_(rows), cols_(cols), place_(place), buffer_(dev, std::size_t(rows * ld())) {
        std::vector<T> all = buffer_.host();
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t j = 0; j < ld(); ++j)
                if (!mine(j))
                    all[std::size_t(i * ld() + j)] = narrow<T>(of_others(j));
                else if (!v.empty())
                    all[std::size_t(i * ld() + j)] = narrow<T>(v[std::size_t(i * cols + j - place.before)]);
        copy_to_device(dev, buffer_.data(), all.data(), buffer_.bytes());
    }
    Mat<T> mat() const { return {buffer_.data() + place_.before, rows_, cols_, ld()}; }
    Values values() const {
        const Values all = buffer_.values();
        Values v;
        for (std::int64_t i = 0; i < rows_; ++i)
            for (std::int64_t j = 0; j < ld(); ++j) {
                const double value = all[std::size_t(i * ld() + j)];
                if (mine(j))
                    v.push_back(value);
                else
                    EXPECT_TRUE(std::isnan(of_others(j)) ? std::isnan(value) : value == of_others(j))
                        << "a column of others was written: row " << i << ", column " << j;
            }
        return v;
    }

  private:
    std::int64_t ld() const { return place_.before + cols_ + place_.after; }
    bool mine(std::int64_t j) const { return j >= place_.before && j < place_.before + cols_; }
    static double of_others(std::int64_t j) { return j % 2 == 0 ? 0x1p60 : std::numeric_limits<double>::quiet_NaN(); }
    std::int64_t rows_, cols_;
    Place place_;
    Buffer<T, Dev> buffer_;
};

// Places for a GPU: columns of others before it in fours, and a row length that is a multiple of four.
inline Place place_for(std::int64_t cols, bool apart) {
    const std::int64_t fill = (4 - cols % 4) % 4;
    return apart ? Place{8, fill + 4} : Place{0, fill};
}

}  // namespace fiedler::test
