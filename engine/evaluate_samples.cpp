#include "engine/evaluate_samples.h"

namespace fiedler {

SampleMetrics evaluate_samples(SampleEngine& engine, const SampleSource& source, const SampleLoader& loader,
                               PartChoice choice) {
    MetricsBuilder builder(source.shape());
    SampleBatch batch;
    for (const Part p : {Part::train, Part::val, Part::test, Part::none}) {
        if (choice != PartChoice::all && static_cast<int>(choice) != static_cast<int>(p)) continue;
        if (source.known(p) == 0) continue;
        for (const auto& samples : loader.in_order(source.samples(p))) {
            source.gather(samples, p, batch);
            builder.add(batch, engine.evaluate(batch));
        }
    }
    return builder.metrics();
}

}  // namespace fiedler
