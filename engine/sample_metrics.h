// engine/sample_metrics.h: how good predictions of samples are.
//
//   classes      accuracy, macro-F1 (mean of F1 over the classes that occur in the targets), the confusion table
//   binary       ROC-AUC, the mean over the targets of which both classes occur (ties count half), accuracy at 1/2
//   regression   MSE and MAE as the model sees them (z-scored data where the source z-scored them); RMSE and MAE in
//                original units where the shape has mean and deviation: the mean over targets of each one's;
//                where the rows have units of their own (channels of a series): over all targets
#pragma once
#include <string>
#include <vector>

#include "engine/sample_engine.h"
#include "engine/samples.h"

namespace fiedler {

struct SampleMetrics {
    TargetKind kind = TargetKind::regression;
    double loss = 0;         // mean over known targets
    std::int64_t known = 0;  // targets; 0: everything else is meaningless
    double accuracy = 0, macro_f1 = 0;
    std::vector<std::int64_t> confusion;  // [outputs, outputs]: target, predicted
    double roc_auc = 0;
    std::int64_t auc_targets = 0;  // of which both classes occur; 0: no AUC
    double mse = 0, mae = 0;
    bool original = false;  // rmse, mae_original exist
    double rmse = 0, mae_original = 0;

    double score() const;  // the larger the better: accuracy, ROC-AUC, -MSE
    // Is it better than `other`? By score, then by loss.
    bool better_than(const SampleMetrics& other) const;
    std::string text() const;  // "accuracy 0.8310, macro-F1 0.8220, loss 0.5701"
    Json to_json(const SampleShape&) const;
    // One number for tables over seeds, with its name.
    std::vector<std::pair<std::string, double>> numbers() const;
};

class MetricsBuilder {
  public:
    explicit MetricsBuilder(const SampleShape& shape) : shape_(shape) {}
    // Targets of the batch; the loss of an engine without dropout.
    void add(const SampleBatch&, const SampleLoss&);
    SampleMetrics metrics() const;

  private:
    struct Pair {
        float prediction, target;
    };
    SampleMetrics of_classes() const;
    SampleMetrics of_binary() const;
    SampleMetrics of_numbers() const;
    SampleShape shape_;
    double loss_ = 0;
    std::int64_t known_ = 0;
    std::vector<std::int64_t> confusion_;
    std::vector<std::vector<Pair>> pairs_;           // by output
    double unit_squares_ = 0, unit_magnitudes_ = 0;  // in the rows' own original units
    std::int64_t with_units_ = 0;
};

// Area under the ROC curve of scores for targets 0 and 1; -1 where only one of them occurs.
double roc_auc(std::vector<std::pair<float, bool>> scored);
// The confusion table for people: rows are targets, columns predictions.
std::string confusion_text(const SampleMetrics&, const SampleShape&);

}  // namespace fiedler
