// engine/run_folder.h: the folder of a training run.
#pragma once
#include <string>
#include <vector>

namespace fiedler {

// Until keep(), a fresh run that fails takes away what it put there, and the folders made for it.
class RunFolder {
  public:
    explicit RunFolder(const std::string& path);
    ~RunFolder();
    RunFolder(const RunFolder&) = delete;
    RunFolder& operator=(const RunFolder&) = delete;
    void keep() { kept_ = true; }

  private:
    std::string path_;
    bool was_free_, kept_ = false;
    std::vector<std::string> made_;
};

// Without --out: runs/PRESET, or runs/PRESET-2, -3, ... when runs are there already. A run to resume is the newest one.
std::string default_folder(const std::string& base, bool resume);
// The same by what lies in the folders, checkpoints or not: the first that is free, or, to resume, the last that is not.
std::string free_folder(const std::string& base, bool resume = false);
// The run that a checkpoint lies in.
std::string folder_around(const std::string& checkpoint);

}  // namespace fiedler
