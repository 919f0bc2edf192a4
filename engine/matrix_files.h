// engine/matrix_files.h: dense matrices of numbers from and to files: NumPy's .npy and CSV/TSV.
//
// NPY format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/files.h"

namespace fiedler {

struct Matrix {
    std::int64_t rows = 0, columns = 0;
    std::vector<float> values;       // [rows, columns] row-major
    std::vector<std::string> names;  // of the columns: the header of a table; else empty
};

// By contents, not by name: a file that begins with "\x93NUMPY" is .npy, else a table of numbers between commas,
// semicolons or tabs, or blanks when the first row has none of these, under a header if the first row has text; lines
// above the first row that begin with # do not count.
//   .npy: versions 1 to 3; float16 to float64, bool, (u)int8 to (u)int64, little-endian; C and Fortran order; two
//   dimensions, or one: a matrix of one column. Numbers are rounded to float once.
// InputError, in one line with row and column (from 0) or file:line: NaN, infinite or beyond float, an empty matrix,
// rows of different lengths, a kind of array that is not read, a file that is cut off or has bytes too many.
Matrix read_matrix(const std::string& path);

// The header of an array of T in C order, its length a multiple of 64: values follow at once. For writers of files that
// are made piece by piece. shape: one or two dimensions.
template <class T>  // float, double
std::string npy_header(const std::vector<std::int64_t>& shape);

// Into a file of a StagedFolder; the caller closes it.
template <class T>  // float, double
void write_npy(FileWriter& out, std::span<const T> values, const std::vector<std::int64_t>& shape);
// A file of its own, whole or not there (write_file_atomic); holds a copy of the values meanwhile.
template <class T>  // float, double
void write_npy(const std::string& path, std::span<const T> values, const std::vector<std::int64_t>& shape);

}  // namespace fiedler
