// engine/sample_split.h: which samples are for training, validation and test: at random, by scaffold, in folds, or from a
// file that says so.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/samples.h"

namespace fiedler {

struct SplitOptions {
    std::string how = "random";                 // random, scaffold, or the path of a file that write_split wrote
    double train = 0.8, val = 0.1, test = 0.1;  // shares; they need not add up to 1
    std::int64_t seed = 0;
    std::int64_t fold = 0,
                 folds = 5;  // fold 1 .. folds is the part test of a random split, val out of the rest; 0: none
};

// One part for each of `count` samples.
//   random     a shuffle by the seed, cut by the shares, counts rounded down for train and for train with val.
//   folds      the same shuffle cut into `folds` pieces as equal as can be: piece `fold` is test, the next
//              round(count * val / (train + val + test)) samples after it, in a ring, are val, others train.
//   scaffold   DeepChem's rule: samples of one scaffold stay together; scaffolds from the most samples to the fewest, of
//              equals the one whose first sample is last, go to train while they fit into its share, then to val, else to
//              test. A seed other than 0 shuffles the scaffolds instead (not those with more than half of val's or test's
//              samples, which come first: a balanced split).
// scaffold_of: [count]. InputError: shares that make no split, a part without samples, a fold that does not exist.
std::vector<Part> split_samples(std::int64_t count, std::span<const std::int32_t> scaffold_of, const SplitOptions&);

// A table for people: "row,part,name", rows from 1; read back by number, after comparing the names.
void write_split(const std::string& path, std::span<const Part>, std::span<const std::string> names);
std::vector<Part> read_split(const std::string& path, std::span<const std::string> names);

const char* name_of(Part);  // "train", "val", "test", "none"

}  // namespace fiedler
