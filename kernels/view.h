// kernels/view.h: typed, non-owning views. A view never allocates, frees or knows whose memory it is, host or device.
//
//   Vec<T>   size elements, contiguous
//   Mat<T>   rows x cols elements, row-major; row i starts at data + i * ld, ld >= cols. Columns [cols, ld) belong to
//            others.
//
// Sizes and strides count elements, never bytes. A view of T converts to a view of const T. A default view is "absent".
#pragma once
#include <cstdint>
#include <type_traits>

namespace fiedler {

template <class T>
struct Vec {
    T* data = nullptr;
    std::int64_t size = 0;

    Vec() = default;
    Vec(T* d, std::int64_t n) : data(d), size(n) {}
    template <class U>
    requires std::is_same_v<const U, T> Vec(const Vec<U>& o) : data(o.data), size(o.size) {}
    explicit operator bool() const { return data != nullptr; }
    Vec slice(std::int64_t first, std::int64_t n) const { return {data + first, n}; }
};

template <class T>
struct Mat {
    T* data = nullptr;
    std::int64_t rows = 0, cols = 0, ld = 0;

    Mat() = default;
    Mat(T* d, std::int64_t r, std::int64_t c) : data(d), rows(r), cols(c), ld(c) {}
    Mat(T* d, std::int64_t r, std::int64_t c, std::int64_t l) : data(d), rows(r), cols(c), ld(l) {}
    template <class U>
    requires std::is_same_v<const U, T> Mat(const Mat<U>& o) : data(o.data), rows(o.rows), cols(o.cols), ld(o.ld) {}
    explicit operator bool() const { return data != nullptr; }
    T* row(std::int64_t i) const { return data + i * ld; }
    Mat columns(std::int64_t first, std::int64_t n) const { return {data + first, rows, n, ld}; }
    Mat slice_rows(std::int64_t first, std::int64_t n) const { return {data + first * ld, n, cols, ld}; }
};

}  // namespace fiedler
