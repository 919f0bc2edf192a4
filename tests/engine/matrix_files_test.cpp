#include "engine/matrix_files.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Size = std::size_t;
using Floats = std::vector<float>;

template <class T>
std::string bytes_of(const std::vector<T>& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}
// A .npy file with this header, as NumPy lays it out.
std::string npy(const std::string& header, const std::string& data, int version = 1) {
    std::string text = header;
    const Size before = version == 1 ? 10 : 12;
    while ((before + text.size() + 1) % 64 != 0) text += ' ';
    text += '\n';
    std::string out = "\x93NUMPY";
    out += {static_cast<char>(version), '\0'};
    for (Size i = 0; i < before - 8; ++i) out += static_cast<char>(text.size() >> 8 * i & 255);
    return out + text + data;
}
std::string header(const std::string& type, const std::string& shape, bool fortran = false) {
    return "{'descr': '" + type + "', 'fortran_order': " + (fortran ? "True" : "False") + ", 'shape': (" + shape +
           "), }";
}
std::string error_of(const std::string& name, const std::string& bytes) {
    const TempFolder t;
    std::string message = input_error_of([&] { read_matrix(t.put(name, bytes)); });
    if (const Size at = message.find(t.path()); at != message.npos) message.erase(at, t.path().size() + 1);
    return message;
}
template <class T>
void expect_type(const std::string& type, const std::vector<T>& values, const Floats& expected) {
    const TempFolder t;
    const Matrix m = read_matrix(t.put("m.npy", npy(header(type, std::to_string(values.size())), bytes_of(values))));
    EXPECT_EQ(m.rows, static_cast<std::int64_t>(values.size())) << type;
    EXPECT_EQ(m.columns, 1) << type;
    EXPECT_EQ(m.values, expected) << type;
}

// ---- .npy ----------------------------------------------------------------------------------------------------------

TEST(MatrixFiles, NpyVersionsAndOrders) {
    const TempFolder t;
    const Floats rows{1, 2, 3, 4, 5, 6};
    for (const int version : {1, 2, 3}) {
        const Matrix c = read_matrix(t.put("c", npy(header("<f4", "2, 3"), bytes_of(rows), version)));
        EXPECT_EQ(c.rows, 2);
        EXPECT_EQ(c.columns, 3);
        EXPECT_EQ(c.values, rows);
    }
    const Matrix f = read_matrix(t.put("f.npy", npy(header("<f4", "2, 3", true), bytes_of(Floats{1, 4, 2, 5, 3, 6}))));
    EXPECT_EQ(f.values, rows);
    EXPECT_TRUE(f.names.empty());
    // Keys in another order and other quotes, as other writers have them.
    const std::string other = "{\"shape\":(2,3),\"fortran_order\":False,\"descr\":\"<f4\"}";
    EXPECT_EQ(read_matrix(t.put("o.npy", npy(other, bytes_of(rows)))).values, rows);
}

TEST(MatrixFiles, NpyFortranOrderAcrossBlocks) {
    const TempFolder t;
    constexpr Size kRows = 201, kColumns = 7;  // blocks of 64 rows
    std::vector<double> data(kRows * kColumns);
    for (Size i = 0; i < data.size(); ++i) data[i] = static_cast<double>(i) + 0.5;
    const std::string path = t.put("m.npy", npy(header("<f8", "201, 7", true), bytes_of(data)));
    const int threads = omp_get_max_threads();
    for (const int n : {1, 3}) {
        omp_set_num_threads(n);
        const Matrix m = read_matrix(path);
        for (Size r = 0; r < kRows; ++r)
            for (Size c = 0; c < kColumns; ++c)
                ASSERT_EQ(m.values[r * kColumns + c], static_cast<float>(data[c * kRows + r])) << r << " " << c;
    }
    omp_set_num_threads(threads);
}

TEST(MatrixFiles, NpyTypes) {
    expect_type<float>("<f4", {-0.5f, 3}, {-0.5f, 3});
    expect_type<float>("=f4", {1}, {1});
    expect_type<double>("<f8", {0.1, -1e-300, 16777217}, {0.1f, -0.0f, 16777216});  // rounded once
    expect_type<std::uint8_t>("|b1", {0, 1}, {0, 1});
    expect_type<std::uint8_t>("|u1", {0, 255}, {0, 255});
    expect_type<std::int8_t>("|i1", {-128, 127}, {-128, 127});
    expect_type<std::int16_t>("<i2", {-32768, 5}, {-32768, 5});
    expect_type<std::uint16_t>("<u2", {65535}, {65535});
    expect_type<std::int32_t>("<i4", {-2147483647, 9}, {-2147483648.0f, 9});
    expect_type<std::uint32_t>("<u4", {4000000000u}, {4e9f});
    expect_type<std::int64_t>("<i8", {-(std::int64_t{1} << 40)}, {-0x1p40f});
    expect_type<std::uint64_t>("<u8", {~std::uint64_t{0}}, {0x1p64f});
    // Halves: 1, -2, 65504 (largest), 2^-24 (smallest), 2^-14 (smallest normal), 1/3 to 11 bits, -0
    expect_type<std::uint16_t>("<f2", {0x3c00, 0xc000, 0x7bff, 0x0001, 0x0400, 0x3555, 0x8000},
                               {1, -2, 65504, 0x1p-24f, 0x1p-14f, 0.333251953125f, -0.0f});
}

TEST(MatrixFiles, NpyRefused) {
    const std::string two = bytes_of(Floats{1, 2});
    EXPECT_HAS(error_of("m.npy", npy(header(">f4", "2"), two)),
               "m.npy: numbers are big-endian (>f4); save array.astype(\"<f4\")");
    EXPECT_HAS(error_of("m.npy", npy(header("<c8", "1"), two)),
               "numbers of type \"<c8\" are not read; save array.astype");
    EXPECT_HAS(error_of("m.npy", npy(header("|O", "1"), two)), "numbers of type \"|O\" are not read");
    EXPECT_HAS(error_of("m.npy", npy(header("<U3", "1"), two)), "numbers of type \"<U3\" are not read");
    EXPECT_HAS(error_of("m.npy", npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }", two)),
               "an array of records");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "1, 2, 1"), two)), "an array of 3 dimensions; a matrix has two");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", ""), bytes_of(Floats{1}))), "an array of 0 dimensions");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "0, 4"), "")), "an array of 0 x 4 is empty");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "2, 2"), two)), "2 x 2 numbers of 4 bytes, but the file holds 8");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "2, 2"), two)), "it is cut off");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "1"), two)), "it has bytes too many");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "4611686018427387904, 4"), two)), "it is cut off");  // 2^64 numbers
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "4611686018427387905, 4"), two)), "it is cut off");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "-2"), two)), "no shape in the header");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "x"), two)), "no shape in the header");
    EXPECT_HAS(error_of("m.npy", npy("{'fortran_order': False, 'shape': (2,)}", two)), "no descr in the header");
    EXPECT_HAS(error_of("m.npy", npy("{'descr': '<f4', 'shape': (2,)}", two)), "no fortran_order in the header");
    EXPECT_HAS(error_of("m.npy", npy("{'descr': '<f4', 'fortran_order': 2, 'shape': (2,)}", two)), "no order in the");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "2"), two, 4)), "version 4 of the .npy format");
    const std::string good = npy(header("<f4", "2"), two);
    for (Size length = 6; length < good.size(); length += 5)
        EXPECT_HAS(error_of("m.npy", good.substr(0, length)), "cut off");
    EXPECT_HAS(error_of("m.npy", "1,2\n"), "m.npy: not a .npy file");
}

TEST(MatrixFiles, NpyNotFinite) {
    const float inf = std::numeric_limits<float>::infinity();
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "2, 3"), bytes_of(Floats{0, 1, 2, 3, NAN, inf}))),
               "m.npy: row 1, column 1 (from 0): NaN");
    EXPECT_HAS(error_of("m.npy", npy(header("<f4", "2, 3", true), bytes_of(Floats{0, 1, 2, inf, NAN, 5}))),
               "m.npy: row 0, column 2 (from 0): NaN");  // the first by rows
    EXPECT_HAS(error_of("m.npy", npy(header("<f8", "1, 2"), bytes_of(std::vector<double>{0, 1e39}))),
               "row 0, column 1 (from 0): infinite or beyond float");
    EXPECT_HAS(error_of("m.npy", npy(header("<f2", "1"), bytes_of(std::vector<std::uint16_t>{0x7c00}))), "infinite");
    EXPECT_HAS(error_of("m.npy", npy(header("<f2", "1"), bytes_of(std::vector<std::uint16_t>{0x7e00}))), "NaN");
}

TEST(MatrixFiles, NpyWrittenIsRead) {
    const TempFolder t;
    const Floats values{1, -2.5f, 3, 4, 5, 0x1p-140f};
    write_npy<float>(t / "a.npy", values, {2, 3});
    const std::string bytes = slurp(t / "a.npy");
    EXPECT_EQ(bytes, npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", bytes_of(values)));
    EXPECT_EQ((bytes.size() - 24) % 64, 0u);
    const Matrix m = read_matrix(t / "a.npy");
    EXPECT_EQ(m.rows, 2);
    EXPECT_EQ(m.columns, 3);
    EXPECT_EQ(m.values, values);

    const std::vector<double> vector{0.1, 0.2, 1e-300};
    write_npy<double>(t / "b.npy", vector, {3});
    EXPECT_EQ(slurp(t / "b.npy"), npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", bytes_of(vector)));
    FileWriter out(t / "c.npy");
    write_npy<double>(out, vector, {3});
    out.close();
    EXPECT_EQ(slurp(t / "c.npy"), slurp(t / "b.npy"));
    EXPECT_THROW(write_npy<double>(t / "d.npy", vector, {2}), RunError);
    EXPECT_THROW(write_npy<double>(t / "d.npy", vector, {1, 3, 1}), RunError);
    EXPECT_FALSE(file_exists(t / "d.npy"));
    EXPECT_HAS(input_error_of([&] { write_npy<double>(t / "nowhere/e.npy", vector, {3}); }), "cannot write");
}

// ---- tables --------------------------------------------------------------------------------------------------------

TEST(MatrixFiles, Tables) {
    const TempFolder t;
    const Matrix m = read_matrix(t.put("m.csv", "# made by hand\r\na,\"b, c\",d\r\n1, 2.5,-3\r\n\r\n4,+5e0,6"));
    EXPECT_EQ(m.rows, 2);
    EXPECT_EQ(m.columns, 3);
    EXPECT_EQ(m.values, (Floats{1, 2.5f, -3, 4, 5, 6}));
    EXPECT_EQ(m.names, (std::vector<std::string>{"a", "b, c", "d"}));
    EXPECT_EQ(read_matrix(t.put("m.tsv", "1\t2\n3\t4\n")).values, (Floats{1, 2, 3, 4}));
    EXPECT_EQ(read_matrix(t.put("m.txt", " 1  2\n3 4 \n")).columns, 2);
    EXPECT_EQ(read_matrix(t.put("s.csv", "1;2\n")).columns, 2);
    EXPECT_EQ(read_matrix(t.put("tiny.csv", "1e-60,0.0e5,-0,1e-999\n")).values, (Floats{0, 0, 0, 0}));
    const Matrix one = read_matrix(t.put("one.csv", "7\n8\n9\n"));
    EXPECT_EQ(one.rows, 3);
    EXPECT_EQ(one.columns, 1);
    EXPECT_TRUE(one.names.empty());
}

TEST(MatrixFiles, TablesRefused) {
    EXPECT_HAS(error_of("m.csv", "1,2\n3\n"), "m.csv:2: 1 fields where the first row has 2");
    EXPECT_HAS(error_of("m.csv", "a,b\n1,2\n3,4,5\n"), "m.csv:3: 3 fields where the first row has 2");
    EXPECT_HAS(error_of("m.csv", "1,2\n3,nan\n"), "m.csv:2: column 2 is \"nan\"; replace what is missing");
    EXPECT_HAS(error_of("m.csv", "nan,2\n"), "m.csv:1: column 1 is \"nan\"");  // no header: a number that is not one
    EXPECT_HAS(error_of("m.csv", "1,2\n-inf,4\n"), "m.csv:2: column 1 is \"-inf\", infinite or beyond float");
    EXPECT_HAS(error_of("m.csv", "1,2\n1e99,4\n"), "m.csv:2: column 1 is \"1e99\", infinite or beyond float");
    EXPECT_HAS(error_of("m.csv", "1,2\n,4\n"), "m.csv:2: column 1 is \"\", not a number");
    EXPECT_HAS(error_of("m.csv", "1,2\n3,x\n"), "m.csv:2: column 2 is \"x\", not a number");
    EXPECT_HAS(error_of("m.csv", "a,b\n"), "m.csv: a header and no rows");
    EXPECT_HAS(error_of("m.csv", ""), "m.csv: no rows");
    EXPECT_HAS(error_of("m.csv", "# c\n"), "m.csv: no rows");
    EXPECT_HAS(error_of("m.csv", std::string("1,2\n\0", 5)), "m.csv:2: a zero byte: a binary file");
    EXPECT_HAS(error_of("m.csv", "\"1,2\n"), "m.csv:1: a quote is not closed");
}

TEST(MatrixFiles, LargeTablesAreReadInPieces) {
    const TempFolder t;
    std::string text = "x\ty\n";
    Floats expected;
    for (int i = 0; i < 300000; ++i) {
        const float x = static_cast<float>(rng::uniform(1, 0, static_cast<std::uint64_t>(i)));
        text += fmt::format("{}\t{}\n", x, i);  // shortest text that reads back as the same float
        expected.push_back(x);
        expected.push_back(static_cast<float>(i));
    }
    const Matrix m = read_matrix(t.put("m.tsv", text));
    EXPECT_EQ(m.rows, 300000);
    EXPECT_EQ(m.values, expected);
    EXPECT_HAS(input_error_of([&] { read_matrix(t.put("m.tsv", text + "1\t2\n3\n")); }), "m.tsv:300003: 1 fields");
}

}  // namespace
}  // namespace fiedler::test
