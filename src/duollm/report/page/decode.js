// Reads the packed tokens that duollm/report/payload.py writes. Losses and routes are read when they are first needed.

export async function decode(page) {
  await Promise.all(page.runs.flatMap((run) => run.domains.map((domain) => unpack(domain, run.layers, run.lossUnit))));
  for (const run of page.runs) run.page = page;
  invite(page.runs);
  return page;
}

export const OF_RUN = " · ";

// The policies of another run on the same text become guests of a domain, under the name of their run.
function invite(runs) {
  const same = (one, other) => one.size === other.size && `${one.document}` === `${other.document}` && one.text.every((piece, t) => piece === other.text[t]);
  for (const run of runs) {
    for (const domain of run.domains) {
      const twins = runs.filter((other) => other !== run).flatMap((other) => other.domains.filter((one) => same(one, domain)).map((one) => [other.name, one]));
      domain.guests = twins.flatMap(([name, twin]) => twin.policies.map((policy) => ({ ...policy, policy: name + OF_RUN + policy.policy })));
    }
  }
  for (const domain of runs.flatMap((run) => run.domains)) domain.policies = [...domain.policies, ...domain.guests];
}

async function unpack(domain, layers, unit) {
  const packed = Uint8Array.from(atob(domain.block), (character) => character.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  domain.bytes = new Uint8Array(await new Response(plain).arrayBuffer());
  delete domain.block;
  Object.assign(domain, { layers, unit, size: domain.text.length });
  let offset = 0;
  for (const policy of domain.policies) {
    Object.assign(policy, { domain, offset });
    offset += 2 * domain.size + (policy.routes ? Math.ceil((domain.size * layers) / 4) : 0);
  }
  domain.ranks = { domain, offset };
}

function step({ domain: { bytes, size }, offset }, t) {
  const zigzag = bytes[offset + t] | (bytes[offset + size + t] << 8);
  return zigzag & 1 ? -(zigzag + 1) / 2 : zigzag / 2;
}

// The loss of a token, nats. All big comes first in the block; the others are stored as differences from it.
export function lossAt(policy, t) {
  const [big] = policy.domain.policies;
  return (step(policy, t) + (policy.offset === big.offset ? 0 : step(big, t))) * policy.domain.unit;
}

export function losses(policy) {
  return (policy.losses ??= Float64Array.from({ length: policy.domain.size }, (_, t) => lossAt(policy, t)));
}

// What all big predicted for a token: its rank, and the likeliest tokens, each [text, percent]; null if it was not kept.
export function predictions({ words, ranks, size, bytes, predictions: shown }, t) {
  if (!words) return null;
  const top = Array.from({ length: shown }, (_, i) => {
    const offset = ranks.offset + 2 * size + 3 * size * i;
    return [words[step({ domain: ranks.domain, offset }, t)], bytes[offset + 2 * size + t]];
  });
  return { rank: step(ranks, t), top };
}

// The branch of a token at a layer: 0 skip, 1 small, 2 big.
export function branch(policy, t, layer) {
  const { bytes, size, layers } = policy.domain;
  const cell = t * layers + layer;
  return (bytes[policy.offset + 2 * size + (cell >> 2)] >> (6 - 2 * (cell & 3))) & 3;
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
