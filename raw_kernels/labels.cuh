// How labels lie in memory and in the registers of a warp, and the query beside them. See label_scores.cu for the tile.
#pragma once

#include "mma.cuh"

struct u2 {};
struct u4 {};
template <typename Label>
constexpr int kBitsOf = 16;
template <>
constexpr int kBitsOf<u2> = 2;
template <>
constexpr int kBitsOf<u4> = 4;

// Heads: query heads that share one reading of the labels, at most.
template <typename Label, int R, int Heads>
struct Layout {
  static constexpr int kBits = kBitsOf<Label>;
  static constexpr bool kNative = kBits == 16;
  static constexpr int kBytes = R * kBits / 8;                                    // of a label
  static constexpr int kFew = R <= 16 ? 1 : R / 16, kMore = R == 16 || R == 32 ? 2 : 1;
  static constexpr int kLanes = kNative ? 4 : kFew * (Heads > 4 ? kMore : 1);      // that hold it: the more, the fewer registers the query takes
  static constexpr int kPart = kBytes / kLanes;                                   // bytes of it in a lane, 2 to 32
  static constexpr int kRaw = kPart < 4 ? 1 : kPart / 2;                          // words of a lane's two tokens
  static constexpr int kWords = R / (kNative ? 2 : 4) / kLanes;                   // ... of one token, spread out: 4 bytes or 2 halves each
  static constexpr int kSteps = ceil_div(kWords, 2);                              // mma
  static constexpr int kHeads = kNative ? 8 : kLanes;                             // query heads of one mma
  static constexpr int kColumns = ceil_div(Heads, kHeads);                        // mma that share the labels
  static constexpr int kTileTokens = 64 / kLanes;
  static constexpr int kTiles = kLanes == 1 ? 1 : kNative ? (R >= 32 ? 1 : 32 / R) : 2;
  static constexpr int kTokens = kTileTokens * kTiles;                            // of a step
  static constexpr int kRegisters = kTiles * (kRaw + (kNative ? 0 : 2));          // that a step's loads take
};

// Bytes [0, Bytes) at `at` into words. A sector of 32 bytes may be read by two instructions: not past L1 then.
template <int Bytes, bool Whole>
__device__ __forceinline__ void load_words(u32* words, const u8* at) {
  if constexpr (Bytes == 4) {
    words[0] = Whole ? load_stream4(at) : __ldg(reinterpret_cast<const u32*>(at));
  } else if constexpr (Bytes == 8) {
    const uint2 v = Whole ? load_stream8(at) : __ldg(reinterpret_cast<const uint2*>(at));
    words[0] = v.x, words[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < Bytes / 16; ++i) {
      const uint4 v = Whole && Bytes == 16 ? load_stream16(at + 16 * i) : __ldg(reinterpret_cast<const uint4*>(at) + i);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  }
}

// The words of token `which` of a pair as an mma wants them: a code a byte, or two halves.
template <typename Label, int R, int Heads>
__device__ __forceinline__ void spread(u32 (&words)[Layout<Label, R, Heads>::kSteps * 2], const u32 (&raw)[Layout<Label, R, Heads>::kRaw], int which) {
  using L = Layout<Label, R, Heads>;
  if constexpr (L::kNative) {
#pragma unroll
    for (int j = 0; j < L::kSteps * 2; ++j) words[j] = j < L::kWords ? raw[which * L::kWords + j] : 0;
  } else if constexpr (L::kPart == 2) {
    // 8 channels of 2 bits: codes 0 and 2 of both bytes, then codes 1 and 3.
    const u32 bytes = __byte_perm(raw[0], raw[0] >> 4, which ? 0x7632 : 0x5410);
    words[0] = bytes & 0x03030303u, words[1] = bytes >> 2 & 0x03030303u;
  } else {
    constexpr int kCount = L::kPart / 4;
    constexpr u32 kMask = L::kBits == 2 ? 0x03030303u : 0x0f0f0f0fu;
#pragma unroll
    for (int j = 0; j < L::kWords; ++j) words[j] = raw[which * kCount + j % kCount] >> (L::kBits * (j / kCount)) & kMask;
  }
}

// The channel that byte `byte` of word `word` stands for, in lane `part` of a label's lanes. Codes j, j + r/n, ... share a byte, n to a byte.
template <typename Label, int R, int Heads>
__device__ __forceinline__ int channel_of(int part, int word, int byte) {
  using L = Layout<Label, R, Heads>;
  if constexpr (L::kPart == 2) return part * 2 + (byte & 1) + L::kBytes * (word + (byte & 2));
  constexpr int kCount = L::kPart / 4;
  return part * L::kPart + word % kCount * 4 + byte + word / kCount * L::kBytes;
}
