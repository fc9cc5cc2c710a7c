// Reads the packed data that duollm/report/payload.py writes. Losses and routes are read when they are first needed.

import { align } from "./align.js";

export async function decode(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(plain).arrayBuffer());
  const end = bytes.indexOf(0); // JSON holds no zero
  const page = JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)));
  for (const run of page.runs) {
    run.page = page;
    for (const domain of run.domains) unpack(domain, run, bytes.subarray(end + 1));
  }
  invite(page.runs);
  return page;
}

export const OF_RUN = " · ";

// The policies of another run on the same text become guests of a domain, under the name of their run.
function invite(runs) {
  const guestsOf = (domain, own) =>
    runs.filter((run) => run !== own).flatMap((run) =>
      run.domains.flatMap((twin) => {
        const cut = align(domain, twin);
        return cut ? twin.policies.map((policy) => ({ ...policy, policy: run.name + OF_RUN + policy.policy, cut })) : [];
      }),
    );
  const found = runs.flatMap((run) => run.domains.map((domain) => [domain, guestsOf(domain, run)]));
  for (const [domain, guests] of found) domain.policies = [...domain.policies, ...guests];
}

function unpack(domain, run, blocks) {
  const [start, length] = domain.block;
  Object.assign(domain, { run, layers: run.layers, size: domain.text.length, bytes: blocks.subarray(start, start + length) });
  let offset = 0;
  for (const policy of domain.policies) {
    Object.assign(policy, { domain, offset });
    offset += 2 * domain.size + (policy.routes ? Math.ceil((domain.size * domain.layers) / 4) : 0);
  }
  domain.ranks = offset;
}

function numberAt({ bytes, size }, offset, t) {
  const zigzag = bytes[offset + t] | (bytes[offset + size + t] << 8);
  return zigzag & 1 ? -(zigzag + 1) / 2 : zigzag / 2;
}

// A loss is stored as its difference from that of another policy, which comes earlier in the block.
function step(policy, t) {
  let sum = 0;
  for (let one = policy; one; one = one.domain.policies[one.base]) sum += numberAt(one.domain, one.offset, t);
  return sum;
}

// The loss of a token, nats; not a number for a token whose text another run does not have.
export function lossAt(policy, t) {
  const { lossUnit } = policy.domain.run;
  if (!policy.cut) return step(policy, t) * lossUnit;
  const { first, last, share } = policy.cut;
  if (first[t] < 0) return NaN;
  let sum = 0;
  for (let row = first[t]; row <= last[t]; row++) sum += step(policy, row);
  return sum * share[t] * lossUnit;
}

export function losses(policy) {
  const size = policy.cut ? policy.cut.first.length : policy.domain.size;
  return (policy.losses ??= Float64Array.from({ length: size }, (_, t) => lossAt(policy, t)));
}

// What all big predicted for a token: its rank, and the likeliest tokens, each [text, percent]; null if it was not kept.
export function predictions(domain, t) {
  const { words, ranks, size, bytes, predictions: shown } = domain;
  if (!words) return null;
  const top = Array.from({ length: shown }, (_, i) => {
    const offset = ranks + 2 * size + 3 * size * i;
    return [words[numberAt(domain, offset, t)], bytes[offset + 2 * size + t]];
  });
  return { rank: numberAt(domain, ranks, t), top };
}

// Whether a policy has a route for a token: not all have routes, nor has another run all tokens.
export function hasRoute({ routes, cut }, t) {
  return routes && (!cut || cut.row[t] >= 0);
}

// The branch of a token at a layer: 0 skip, 1 small, 2 big.
export function branch({ domain, cut, offset }, t, layer) {
  const cell = (cut ? cut.row[t] : t) * domain.layers + layer;
  return (domain.bytes[offset + 2 * domain.size + (cell >> 2)] >> (6 - 2 * (cell & 3))) & 3;
}

export function bigLayers(policy, t) {
  let big = 0;
  for (let layer = 0; layer < policy.domain.layers; layer++) big += branch(policy, t, layer) === 2;
  return big;
}

// The last start at or before a row; starts are ascending.
export function indexOf(starts, row) {
  let low = 0;
  let high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= row) low = middle;
    else high = middle - 1;
  }
  return low;
}
