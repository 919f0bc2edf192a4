#include "engine/sample_sources.h"

#include <stdexcept>

#include "engine/molecule_source.h"
#include "engine/node_samples.h"
#include "engine/series_source.h"

namespace fiedler {

std::unique_ptr<SampleSource> open_samples(const Config& c, const TrainedSamples* trained, std::FILE* words) {
    switch (c.task) {
        case Task::nodes:
            return open_nodes(c, trained, words);
        case Task::molecules:
            return open_molecules(c, trained, words);
        case Task::series:
            return open_series(c, trained, words);
        case Task::text:
            break;
    }
    throw std::logic_error("sample_sources: text is no task of samples");
}

}  // namespace fiedler
