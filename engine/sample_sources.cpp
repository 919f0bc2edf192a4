#include "engine/sample_sources.h"

#include "engine/error.h"
#include "engine/node_samples.h"

namespace fiedler {

std::unique_ptr<SampleSource> open_samples(const Config& c, const TrainedSamples* trained, std::FILE* words) {
    switch (c.task) {
        case Task::nodes:
            return open_nodes(c, trained, words);
        case Task::molecules:
        case Task::series:
            break;
        case Task::text:
            throw std::logic_error("sample_sources: text is no task of samples");
    }
    throw InputError("task: this version reads nodes only");
}

}  // namespace fiedler
