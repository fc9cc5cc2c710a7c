// Aligns a text that two models cut into different tokens.

const HOLE = "\ufffd"; // what a token shows that holds a piece of a character
const HOLE_UNITS = 8; // units of text that stand for one hole, at most
const ENOUGH = 4; // units that must agree after a hole

// Return for each token of `host` which rows of `guest` cover the same text, and its share of their loss; null if the two
// have no text in common. `first` is -1 for a token whose text the guest does not have. `row` is where the token begins.
export function align(host, guest) {
  const rows = () => new Int32Array(host.size).fill(-1);
  const cut = { first: rows(), last: rows(), row: rows(), share: new Float64Array(host.size) };
  if (sameTokens(host, guest)) for (let t = 0; t < Math.min(host.size, guest.size); t++) cover([{ row: t, text: "." }], [{ row: t, text: "." }], cut);
  else if (host.begins && guest.begins) {
    host.documents.forEach((name, d) => {
      const found = guest.documents.indexOf(name);
      if (found >= 0) alignDocument(piecesOf(host, d), piecesOf(guest, found), cut);
    });
  }
  return cut.first.some((row) => row >= 0) ? cut : null;
}

// One of the runs may show more tokens than the other.
function sameTokens(one, other) {
  const shown = Math.min(one.size, other.size);
  const starts = ({ document, documents }) => `${document.filter((row) => row < shown)} ${documents.filter((_, d) => document[d] < shown)}`;
  return starts(one) === starts(other) && one.text.every((piece, t) => t >= shown || piece === other.text[t]);
}

// The tokens of a document, and those that begin its windows, which have no row and no loss.
function piecesOf({ document, window, begins, text, size }, d) {
  const [pieces, windows] = [[], new Map(window.map((row, w) => [row, w]))];
  for (let t = document[d]; t < (document[d + 1] ?? size); t++) {
    if (windows.has(t)) pieces.push({ row: -1, text: begins[windows.get(t)] });
    pieces.push({ row: t, text: text[t] });
  }
  return pieces;
}

// Where each piece begins, and where the last one ends.
function placesOf(pieces) {
  const places = [0];
  for (const { text } of pieces) places.push(places.at(-1) + text.length);
  return places;
}

// Between two places at which both models end a token lies the same text. Its loss is divided by length.
function alignDocument(mine, its, cut) {
  const [myPlaces, itsPlaces] = [placesOf(mine), placesOf(its)];
  const same = matched(mine.map((one) => one.text).join(""), its.map((one) => one.text).join(""));
  const ends = new Map(itsPlaces.map((place, n) => [place, n]));
  let [m, n] = [0, 0];
  for (let end = 1; end < myPlaces.length; end++) {
    const stop = ends.get(same.get(myPlaces[end]));
    if (stop === undefined) continue;
    cover(mine.slice(m, end), its.slice(n, stop), cut);
    [m, n] = [end, stop];
  }
}

function cover(mine, its, cut) {
  if (!its.length || its.some((one) => one.row < 0)) return;
  const [myPlaces, itsPlaces] = [placesOf(mine), placesOf(its)];
  const length = myPlaces.at(-1) || 1;
  mine.forEach(({ row, text }, i) => {
    if (row < 0) return;
    const place = (myPlaces[i] / length) * itsPlaces.at(-1);
    cut.first[row] = its[0].row;
    cut.last[row] = its.at(-1).row;
    cut.row[row] = its[Math.max(0, itsPlaces.findLastIndex((start, n) => n < its.length && start <= place))].row;
    cut.share[row] = text.length / length;
  });
}

// The places in text a at which text b, read alongside, has come to a certain place of its own.
function matched(a, b) {
  const places = new Map();
  let [i, j] = [0, 0];
  for (;;) {
    places.set(i, j);
    if (i >= a.length || j >= b.length) return places;
    if (a[i] === b[j] && a[i] !== HOLE) [i, j] = [i + 1, j + 1];
    else {
      const next = afterHoles(a, i, b, j);
      if (!next) return places;
      [i, j] = next;
    }
  }
}

// A text with a hole may stand beside one that has the whole character: find where both go on alike.
function afterHoles(a, i, b, j) {
  const after = (text, at) => at + /^\ufffd*/.exec(text.slice(at, at + HOLE_UNITS))[0].length;
  const [x, y] = [after(a, i), after(b, j)];
  if (x === i && y === j) return null;
  for (let n = 0; n <= HOLE_UNITS; n++) {
    const [p, q] = [x === i ? x + n : x, y === j ? y + n : y];
    if (a.slice(p, p + ENOUGH) === b.slice(q, q + ENOUGH)) return [p, q];
  }
  return null;
}
