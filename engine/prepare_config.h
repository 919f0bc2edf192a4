// engine/prepare_config.h: from the knobs to a dataset: what `prepare`, `train` and `eval` share.
#pragma once
#include <cstdio>

#include "engine/config.h"
#include "engine/dataset.h"
#include "engine/prepare.h"

namespace fiedler {

PrepareOptions prepare_options(const Config&);
// The dataset that --data names, prepared first where it is a corpus. log: progress and summary, nullptr for silence.
Dataset open_dataset(const Config&, std::FILE* log);
// The model's vocabulary must be the data's: InputError where it is not.
void match_vocabulary(Config&, const Dataset&);

}  // namespace fiedler
