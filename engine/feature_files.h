// engine/feature_files.h: features of nodes from files, as sparse rows.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fiedler {

struct FeatureRows {
    std::int64_t columns = 0;
    std::vector<std::int32_t> offsets{0};  // [rows + 1]
    std::vector<std::int32_t> column_of;   // [entries], ascending in each row
    std::vector<float> values;             // [entries]
    std::int64_t rows() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
    bool dense() const { return static_cast<std::int64_t>(values.size()) * 2 > rows() * columns; }
};

// By contents. Sparse: the first line is "rows columns entries", then a line a row, pairs column:value from column 0,
// between blanks; a line without any is a row of zeros. Else a matrix (matrix_files.h). Zeros are left out.
// InputError with file and line: a column twice or out of range, a value that is not finite, another number of rows or
// entries than the first line says; at most 2^31 - 1 entries.
FeatureRows read_features(const std::string& path);

// Each row divided by the sum of its magnitudes; rows of zeros stay.
void normalise_rows(FeatureRows&);

}  // namespace fiedler
