// Suffix array by induced sorting, longest common prefixes of its neighbours, then one pass over the text from its end
// that unlinks every suffix from the array: linear time. Sequences in parallel.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <unordered_map>
#include <vector>

#include "../checks.h"

namespace megatron_orz {
namespace {

// Threads pay off from about this many tokens.
constexpr int64_t kTokensPerTask = 4096;

// Suffix array of a text by SA-IS (Nong, Zhang and Chan 2011). A suffix is of type S if it is smaller than the one
// behind it, else of type L; LMS suffixes are of type S with one of type L before them. Sorted LMS suffixes induce the
// order of all others, and are themselves sorted by a text of half the length, whose symbols are their substrings.
class SuffixSorter {
 public:
  // text: n symbols of 0 .. num_symbols - 1, of which 0 occurs once, at the end. suffixes: receives n positions.
  SuffixSorter(const int32_t* text, int32_t* suffixes, int32_t n, int32_t num_symbols)
      : text_(text), suffixes_(suffixes), n_(n), is_s_(n), starts_(num_symbols + 1), cursors_(num_symbols) {
    is_s_[n - 1] = true;
    for (int32_t i = n - 2; i >= 0; --i) {
      is_s_[i] = text[i] < text[i + 1] || (text[i] == text[i + 1] && is_s_[i + 1]);
    }
    for (int32_t i = 0; i < n; ++i) ++starts_[text[i] + 1];
    for (int32_t c = 0; c < num_symbols; ++c) starts_[c + 1] += starts_[c];
  }

  void sort() {
    std::fill(suffixes_, suffixes_ + n_, -1);
    to_ends();
    for (int32_t i = 1; i < n_; ++i) {
      if (is_lms(i)) suffixes_[--cursors_[text_[i]]] = i;
    }
    induce();
    const int32_t num_lms = sort_lms();
    std::fill(suffixes_ + num_lms, suffixes_ + n_, -1);
    to_ends();
    for (int32_t i = num_lms - 1; i >= 0; --i) {
      const int32_t suffix = suffixes_[i];
      suffixes_[i] = -1;
      suffixes_[--cursors_[text_[suffix]]] = suffix;
    }
    induce();
  }

 private:
  bool is_lms(int32_t i) const {
    return i > 0 && is_s_[i] && !is_s_[i - 1];
  }

  void to_ends() {
    std::copy(starts_.begin() + 1, starts_.end(), cursors_.begin());
  }

  // From the LMS suffixes at the ends of their buckets to all suffixes.
  void induce() {
    std::copy(starts_.begin(), starts_.end() - 1, cursors_.begin());
    for (int32_t i = 0; i < n_; ++i) {
      const int32_t before = suffixes_[i] - 1;
      if (before >= 0 && !is_s_[before]) suffixes_[cursors_[text_[before]]++] = before;
    }
    to_ends();
    for (int32_t i = n_ - 1; i >= 0; --i) {
      const int32_t before = suffixes_[i] - 1;
      if (before >= 0 && is_s_[before]) suffixes_[--cursors_[text_[before]]] = before;
    }
  }

  // From LMS substrings in order, somewhere in the array, to LMS suffixes in order at its front; returns their number.
  int32_t sort_lms() {
    const int32_t num_lms =
        std::remove_if(suffixes_, suffixes_ + n_, [&](int32_t i) { return !is_lms(i); }) - suffixes_;
    // LMS positions are at least two apart, so half a position is a slot of its own.
    int32_t* names = suffixes_ + num_lms;
    std::fill(names, suffixes_ + n_, -1);
    int32_t num_names = 0;
    for (int32_t i = 0; i < num_lms; ++i) {
      if (i > 0 && !same_substring(suffixes_[i - 1], suffixes_[i])) ++num_names;
      names[suffixes_[i] / 2] = num_names;
    }
    ++num_names;
    std::vector<int32_t> shorter;
    shorter.reserve(num_lms);
    std::copy_if(names, suffixes_ + n_, std::back_inserter(shorter), [](int32_t name) { return name >= 0; });
    if (num_names < num_lms) {
      SuffixSorter(shorter.data(), suffixes_, num_lms, num_names).sort();
    } else {
      for (int32_t i = 0; i < num_lms; ++i) suffixes_[shorter[i]] = i;
    }
    std::vector<int32_t>& positions = shorter;
    positions.clear();
    for (int32_t i = 1; i < n_; ++i) {
      if (is_lms(i)) positions.push_back(i);
    }
    for (int32_t i = 0; i < num_lms; ++i) suffixes_[i] = positions[suffixes_[i]];
    return num_lms;
  }

  // Whether the substrings from two LMS positions up to the next ones are equal. The last one is the end alone.
  bool same_substring(int32_t a, int32_t b) const {
    if (a == n_ - 1 || b == n_ - 1) return false;
    for (int32_t i = 0;; ++i) {
      if (text_[a + i] != text_[b + i] || is_s_[a + i] != is_s_[b + i]) return false;
      if (i > 0 && (is_lms(a + i) || is_lms(b + i))) return is_lms(a + i) && is_lms(b + i);
    }
  }

  const int32_t* text_;
  int32_t* suffixes_;
  int32_t n_;
  std::vector<char> is_s_;
  std::vector<int32_t> starts_, cursors_;  // of the buckets of suffixes with one first symbol
};

// Equal tokens become equal symbols from 1 on, in the order in which they appear; 0 ends the text.
std::vector<int32_t> text_of(const int64_t* tokens, int32_t n, int32_t& num_symbols) {
  std::unordered_map<int64_t, int32_t> symbols;
  symbols.reserve(n);
  std::vector<int32_t> text(n + 1);
  for (int32_t i = 0; i < n; ++i) {
    text[i] = symbols.try_emplace(tokens[i], static_cast<int32_t>(symbols.size()) + 1).first->second;
  }
  num_symbols = static_cast<int32_t>(symbols.size()) + 1;
  return text;
}

// lengths[r]: how many symbols the suffixes of rank r - 1 and r share (Kasai et al. 2001).
std::vector<int32_t> shared_lengths(
    const std::vector<int32_t>& text, const std::vector<int32_t>& suffixes, const std::vector<int32_t>& ranks) {
  std::vector<int32_t> lengths(suffixes.size());
  int32_t shared = 0;
  for (size_t i = 0; i + 1 < text.size(); ++i) {
    const int32_t before = suffixes[ranks[i] - 1];  // rank 0 is the end alone
    while (text[i + shared] == text[before + shared]) ++shared;
    lengths[ranks[i]] = shared;
    shared = std::max(0, shared - 1);
  }
  return lengths;
}

void longest_previous_factor_of(const int64_t* tokens, int32_t n, int32_t* out) {
  if (n == 0) return;
  int32_t num_symbols;
  const std::vector<int32_t> text = text_of(tokens, n, num_symbols);
  std::vector<int32_t> suffixes(n + 1), ranks(n + 1);
  SuffixSorter(text.data(), suffixes.data(), n + 1, num_symbols).sort();
  for (int32_t r = 0; r <= n; ++r) ranks[suffixes[r]] = r;
  std::vector<int32_t> lengths = shared_lengths(text, suffixes, ranks);

  // Of the suffixes that are left in the list, `i` begins last: its neighbours share more with it than all others.
  std::vector<int32_t> previous(n + 2), next(n + 2);
  for (int32_t r = 0; r <= n; ++r) previous[r + 1] = r, next[r] = r + 1;
  lengths.push_back(0);
  for (int32_t i = n - 1; i >= 0; --i) {
    const int32_t r = ranks[i];
    int32_t& after = lengths[next[r]];
    out[i] = std::max(lengths[r], after);
    after = std::min(lengths[r], after);
    previous[next[r]] = previous[r];
    next[previous[r]] = next[r];
  }
}

at::Tensor longest_previous_factor(const at::Tensor& tokens, const at::Tensor& cu_seqlens) {
  CHECK_1D(tokens);
  CHECK_DTYPE(tokens, at::kLong);
  CHECK_1D(cu_seqlens);
  CHECK_DTYPE(cu_seqlens, at::kInt);
  const at::Tensor ids = tokens.contiguous();
  const at::Tensor bounds = cu_seqlens.contiguous();
  check_boundaries(bounds, ids.numel());

  at::Tensor out = at::empty(ids.sizes(), ids.options().dtype(at::kInt));
  const auto* bound = bounds.const_data_ptr<int32_t>();
  const auto* id = ids.const_data_ptr<int64_t>();
  auto* length = out.mutable_data_ptr<int32_t>();
  const int64_t num_sequences = bounds.numel() - 1;
  // A task takes the sequences that begin among its tokens.
  at::parallel_for(0, ids.numel(), kTokensPerTask, [&](int64_t first, int64_t last) {
    int64_t i = std::lower_bound(bound, bound + num_sequences, first) - bound;
    for (; i < num_sequences && bound[i] < last; ++i) {
      longest_previous_factor_of(id + bound[i], bound[i + 1] - bound[i], length + bound[i]);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(megatron_orz, CPU, m) {
  m.impl("longest_previous_factor", &longest_previous_factor);
}

}  // namespace
}  // namespace megatron_orz
