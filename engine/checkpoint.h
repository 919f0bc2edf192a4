// engine/checkpoint.h: the state of a training run on disk, from which it goes on as if it had never stopped.
//
//   RUN/step_00001000/   master.bin, moment1.bin, ...   raw little-endian blocks, as given to the writer
//                        tokenizer.model                a copy of the run's tokenizer
//                        manifest.json                  written last: step, seed, data cursor, config, state, size and
//                                                       XXH3-64 of every file; its own XXH3-64 is its last field
//
// The folder is built under a temporary name and renamed: a checkpoint exists when its manifest does. A process that is
// killed while writing leaves the checkpoints before it as they were.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/files.h"
#include "engine/json.h"

namespace fiedler {

struct CheckpointMeta {
    std::int64_t step = 0;    // optimizer steps done
    std::int64_t tokens = 0;  // tokens seen
    std::int64_t seed = 0;
    Json config = Json::object();  // to_json(Config)
    Json data = Json::object();    // the data cursor, and what identifies the data
    Json state = Json::object();   // anything else: outlier detectors, best loss, seconds of training
};

class CheckpointWriter {
  public:
    CheckpointWriter(const std::string& run_folder, std::int64_t step);
    // Writes a file NAME.bin; the memory may be used again at once. Names are words, each once.
    void add(const std::string& name, const void* data, std::size_t bytes);
    void add_copy(const std::string& path, const std::string& file);  // as with the tokenizer
    // Completes the checkpoint, then deletes all but the newest `keep` of the run. Returns the checkpoint's folder.
    std::string commit(const CheckpointMeta&, std::int64_t keep);

  private:
    std::string run_folder_, folder_;
    std::int64_t step_;
    StagedFolder staged_;
    Json files_ = Json::array();
};

class Checkpoint {
  public:
    // Verifies sizes and checksums of everything; InputError when anything is missing, torn, corrupt, foreign or newer.
    explicit Checkpoint(const std::string& folder);
    const std::string& folder() const { return folder_; }
    const CheckpointMeta& meta() const { return meta_; }
    std::vector<std::string> names() const;
    // A block, in memory as long as the Checkpoint. InputError when it is absent or of another size (any: no check).
    static constexpr std::size_t any_size = static_cast<std::size_t>(-1);
    const void* block(const std::string& name, std::size_t bytes = any_size) const;
    std::size_t block_bytes(const std::string& name) const;
    std::string file(const std::string& name) const;  // path of a copied file

  private:
    void read_files(const Json& manifest);
    std::string folder_;
    CheckpointMeta meta_;
    std::map<std::string, MappedFile> blocks_;
};

using Notice = std::function<void(const std::string&)>;

// The newest complete checkpoint of a run, or "". Torn ones are skipped, with a notice for each.
// A newer format is an InputError.
std::string latest_checkpoint(const std::string& run_folder, const Notice& notice = {});
// `path` is a checkpoint or a run with checkpoints: the checkpoint to use. InputError when there is none.
std::string find_checkpoint(const std::string& path, const Notice& notice = {});
// Does the folder look like a checkpoint (it has a manifest)?
bool is_checkpoint(const std::string& folder);

std::string checkpoint_name(std::int64_t step);  // "step_00001000"

}  // namespace fiedler
