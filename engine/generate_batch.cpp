#include "engine/generate_batch.h"

#include <algorithm>
#include <chrono>

#include "engine/error.h"

namespace fiedler {

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

std::string text_of(const Tokenizer& tokenizer, const std::vector<std::int32_t>& tokens) {
    StreamDecoder decoder(tokenizer);
    std::string text;
    for (const std::int32_t t : tokens) text += decoder.push(t);
    return text + decoder.finish();
}

// Texts in the order of their requests, whatever the order in which they end.
class InOrder {
  public:
    InOrder(std::vector<BatchText>& texts, const TextReady& ready) : texts_(texts), ready_(ready) {}
    // False: stop.
    bool give() {
        while (next_ < texts_.size() && texts_[next_].complete()) {
            if (ready_ && !ready_(next_, texts_[next_])) return false;
            ++next_;
        }
        return true;
    }

  private:
    std::vector<BatchText>& texts_;
    const TextReady& ready_;
    std::size_t next_ = 0;
};

// Who has which slot, and what is still to be given one.
class Seats {
  public:
    static constexpr std::size_t kNobody = ~std::size_t{0};

    Seats(BatchDecoder& decoder, const std::vector<TextRequest>& requests, std::int64_t max_tokens)
        : decoder_(decoder),
          requests_(requests),
          max_tokens_(max_tokens),
          holder_(static_cast<std::size_t>(decoder.slots()), kNobody),
          since_(holder_.size()) {}
    bool busy() const { return seated_ > 0; }
    bool waiting() const { return next_ < requests_.size(); }
    std::size_t holder(std::size_t slot) const { return holder_[slot]; }
    double seconds(std::size_t slot) const { return since(since_[slot]); }
    void leave(std::size_t slot) {
        holder_[slot] = kNobody;
        --seated_;
    }
    // Prompts take free slots, several at once: a forward pass costs about the same for one as for a few.
    void seat() {
        const std::size_t free = holder_.size() - seated_, left = requests_.size() - next_;
        if (left == 0 || free < std::min(left, std::max<std::size_t>(1, holder_.size() / 8))) return;
        std::vector<SlotStart> starts;
        for (std::size_t slot = 0; slot < holder_.size() && waiting(); ++slot) {
            if (holder_[slot] != kNobody) continue;
            const TextRequest& r = requests_[next_];
            starts.push_back({static_cast<std::int64_t>(slot), r.prompt, r.seed, max_tokens_});
            holder_[slot] = next_++;
            since_[slot] = Clock::now();
            ++seated_;
        }
        decoder_.start(starts);
    }

  private:
    BatchDecoder& decoder_;
    const std::vector<TextRequest>& requests_;
    std::int64_t max_tokens_;
    std::vector<std::size_t> holder_;
    std::vector<Clock::time_point> since_;
    std::size_t next_ = 0, seated_ = 0;
};

}  // namespace

const char* name_of(BatchText::End e) {
    switch (e) {
        case BatchText::End::stop:
            return "stop";
        case BatchText::End::length:
            return "length";
        case BatchText::End::interrupted:
            return "interrupted";
    }
    return "?";
}

std::vector<std::int32_t> prompt_tokens(const Tokenizer& tokenizer, const std::string& prompt) {
    std::vector<std::int32_t> tokens{tokenizer.separator()};
    const std::vector<std::int32_t> encoded = tokenizer.encode(prompt);
    tokens.insert(tokens.end(), encoded.begin(), encoded.end());
    return tokens;
}

std::vector<BatchText> generate_batch(BatchDecoder& decoder, const Tokenizer& tokenizer,
                                      const std::vector<TextRequest>& requests, std::int64_t max_tokens,
                                      const TextReady& ready, const StopAsked& stop, BatchTotals& totals) {
    const auto start = Clock::now();
    std::vector<BatchText> texts(requests.size());
    for (std::size_t i = 0; i < texts.size(); ++i) {
        texts[i].prompt_tokens = static_cast<std::int64_t>(requests[i].prompt.size());
        totals.prompt_tokens += texts[i].prompt_tokens;
    }
    totals.slots = decoder.slots();
    totals.cache_bytes_per_token = decoder.cache_bytes_per_token();
    InOrder order(texts, ready);
    Seats seats(decoder, requests, max_tokens);
    // The tokens of the oldest step on its way. False: stop.
    const auto take = [&] {
        const std::vector<std::int32_t>& given = decoder.finish_step();
        bool ended = false;
        for (std::size_t slot = 0; slot < given.size(); ++slot) {
            const std::size_t holder = seats.holder(slot);
            if (given[slot] == BatchDecoder::kNothing || holder == Seats::kNobody) continue;
            BatchText& t = texts[holder];
            ++totals.tokens;
            if (t.first_token_seconds == 0) t.first_token_seconds = seats.seconds(slot);
            const bool stopped = given[slot] == tokenizer.separator();
            if (!stopped) t.tokens.push_back(given[slot]);
            if (!stopped && static_cast<std::int64_t>(t.tokens.size()) < max_tokens) continue;
            t.end = stopped ? BatchText::End::stop : BatchText::End::length;
            t.text = text_of(tokenizer, t.tokens);
            seats.leave(slot);
            ended = true;
        }
        return !ended || order.give();
    };
    int on_the_way = 0;
    bool wanted = true;
    while (wanted && (seats.busy() || seats.waiting()) && !(stop && stop())) {
        seats.seat();
        decoder.submit_step();
        ++totals.steps;
        if (++on_the_way == BatchDecoder::kStepsInFlight) wanted = take(), --on_the_way;
    }
    for (; on_the_way > 0; --on_the_way) {
        if (wanted)
            wanted = take();
        else
            (void)decoder.finish_step();
    }
    for (BatchText& t : texts)
        if (!t.complete()) t.text = text_of(tokenizer, t.tokens);
    totals.seconds = since(start);
    return texts;
}

std::vector<BatchText> generate_each(const MakeDecoder& make, const Tokenizer& tokenizer,
                                     const std::vector<TextRequest>& requests, const GenerateSettings& settings,
                                     const TextReady& ready, const StopAsked& stop, BatchTotals& totals) {
    const auto start = Clock::now();
    std::vector<BatchText> texts(requests.size());
    InOrder order(texts, ready);
    std::int64_t longest = 0;
    for (std::size_t i = 0; i < texts.size(); ++i) {
        texts[i].prompt_tokens = static_cast<std::int64_t>(requests[i].prompt.size());
        totals.prompt_tokens += texts[i].prompt_tokens;
        longest = std::max(longest, texts[i].prompt_tokens);
    }
    const auto decoder = make(longest + settings.max_tokens);
    totals.slots = 1;
    totals.cache_bytes_per_token = decoder->cache_bytes_per_token();
    bool wanted = true;
    const auto asked = [&] { return stop && stop(); };
    for (std::size_t i = 0; i < texts.size() && wanted && !asked(); ++i) {
        BatchText& t = texts[i];
        const auto begun = Clock::now();
        SamplingSettings how = settings.sampling;
        how.seed = requests[i].seed;
        decoder->prefill(requests[i].prompt);
        while (!t.complete() && !asked()) {
            const std::int32_t next = sample(decoder->logits(), how, static_cast<std::uint64_t>(decoder->length()));
            ++totals.tokens, ++totals.steps;
            if (t.first_token_seconds == 0) t.first_token_seconds = since(begun);
            if (next == tokenizer.separator()) {
                t.end = BatchText::End::stop;
                break;
            }
            t.tokens.push_back(next);
            if (static_cast<std::int64_t>(t.tokens.size()) == settings.max_tokens)
                t.end = BatchText::End::length;
            else
                decoder->append(next);
        }
        t.text = text_of(tokenizer, t.tokens);
        wanted = order.give();
    }
    totals.seconds = since(start);
    return texts;
}

}  // namespace fiedler
