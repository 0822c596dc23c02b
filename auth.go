package main

// Who is calling, and for which tenant. This file can be read alone, from top to bottom.
//
// Defended: someone without a key, or with a guessed, mistyped, expired, revoked or replaced one,
// or with a stolen copy of the database (it holds digests, not keys), gets nothing. While
// users_table is unreadable or unreachable, or was seen and is gone, no key is admitted and no
// request goes without one: doubt never opens the door. A change by the operator holds from the
// next request on, on every server, because nothing about a key is cached.
//
// Not defended: whoever reads a key on its way (use TLS), or where its user keeps it, has it.
// Whoever may write to keys_table, or controls this process, decides who gets in.
//
// A key is 256 random bits, so one fast SHA-256 is the right digest of it. Failures are throttled
// to spare the log and the database, not because guessing could succeed.

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// openTenant owns all data while there is no users_table.
	openTenant = "00000000-0000-0000-0000-000000000000"
	// authTimeout bounds the wait for the database, before 503. A healthy one takes a millisecond.
	authTimeout = 5 * time.Second
	// A noted last use is renewed at this age: a write for each request would cost too much.
	lastUsePrecision = 5 * time.Minute

	// Beyond so many bad keys a minute an address gets 429. No mistake in a script reaches it.
	failureBurst = 300
	// maxSources are counted at a time, which takes a few megabytes at most.
	maxSources  = 10_000
	keyIDLength = 8
)

// Caller is whom a request acts for. Only this file makes one; every method of the store that
// touches tenant data takes it.
type Caller struct {
	tenant   string // a UUID
	email    string // "" in open mode
	keyID    string // likewise
	readOnly bool
	open     bool // there is no users_table, and everyone is this caller
}

// operatorOf is the Caller of a command about one tenant's data, which the tables' owner gives.
func operatorOf(tenant string) Caller { return Caller{tenant: tenant} }

// denialKind is what a refused caller is told. server.go gives each kind its HTTP status.
type denialKind string

const (
	noKeyGiven     denialKind = "API key required. Please provide X-API-Key header."
	badKeyGiven    denialKind = "Invalid or inactive API key."
	tooManyBadKeys denialKind = "Too many failed authentications. Try again in a minute."
	usersUnknown   denialKind = "The database is not available."
	usersRequired  denialKind = "Authentication is required but not set up."
	foreignHost    denialKind = "The Host header names another host than this server."
	crossOrigin    denialKind = "Cross-origin requests are refused."
)

// denial is the error of a caller that is not let in. All but its kind is for the log alone.
type denial struct {
	kind   denialKind
	reason string
	keyID  string // "" unless a well-formed key was given
	isKey  bool   // the key is, or was, one of ours
}

func (d *denial) Error() string { return string(d.kind) }

// keyRecord is what the database knows of a key and its user. It holds facts; fault judges.
type keyRecord struct {
	id, tenant, email string
	readOnly, active  bool       // the key; the user
	digest            []byte     // nil if there is no such key
	replaced, inGrace bool       // by another key; it works until revokedAt
	now               time.Time  // by the database's clock, as are the times below
	expiresAt         *time.Time // nil: never
	revokedAt         *time.Time // nil: never
}

// fault says why a key does not work; "" if it does. Its user counts last, so that a key which
// would not work again is told from one that would.
func (k *keyRecord) fault() string {
	isRevoked := k.revokedAt != nil && (!k.inGrace || !k.now.Before(*k.revokedAt))
	switch {
	case isRevoked && k.replaced:
		return "replaced"
	case isRevoked:
		return "revoked"
	case k.expiresAt != nil && !k.now.Before(*k.expiresAt):
		return "expired"
	case !k.active:
		return "deactivated"
	}
	return ""
}

// keyStore is the part of the database that decides who gets in.
type keyStore interface {
	// UsersTableExists: true is present, false is proven absent, an error is neither.
	UsersTableExists(ctx context.Context) (bool, error)
	// LookupKey finds a key, in whatever state, by its SHA-256 digest; without digest: none.
	LookupKey(ctx context.Context, digest []byte) (keyRecord, error)
	// TouchKey notes that a key was used now.
	TouchKey(ctx context.Context, keyID string) error
}

// authenticator decides for every request.
type authenticator struct {
	keys        keyStore
	requireAuth bool        // without users_table refuse everyone, rather than admit everyone
	host        string      // the host that the server was told to listen on
	badKeys     tally       // by address
	noted       sync.Map    // when this server noted a use, by key id
	touching    atomic.Bool // a last use is being written
	latched     atomic.Bool // users_table was seen: from then on its absence is a fault
}

// authenticate returns whom r acts for, or a *denial.
func (a *authenticator) authenticate(r *http.Request) (Caller, error) {
	ctx, cancel := context.WithTimeout(r.Context(), authTimeout)
	defer cancel()
	if !a.latched.Load() {
		exists, err := a.keys.UsersTableExists(ctx)
		if err != nil {
			return Caller{}, &denial{kind: usersUnknown, reason: "users_table: " + err.Error()}
		}
		if !exists {
			return a.openCaller(r)
		}
		a.latched.Store(true)
	}
	values := r.Header.Values("X-API-Key")
	if len(values) == 0 || len(values) == 1 && values[0] == "" {
		return Caller{}, &denial{kind: noKeyGiven, reason: "no key"}
	}
	if len(values) > 1 || !wellFormedKey(values[0]) {
		return Caller{}, a.deny(r, denial{reason: "malformed key"})
	}
	return a.judge(ctx, r, values[0])
}

// judge looks up a well-formed key and decides whether it opens the door. All refusals are the
// same to the client; the log gets the reason and the id, which may be shown.
func (a *authenticator) judge(ctx context.Context, r *http.Request, key string) (Caller, error) {
	digest := sha256.Sum256([]byte(key))
	k, err := a.keys.LookupKey(ctx, digest[:])
	if err != nil {
		return Caller{}, &denial{kind: usersUnknown, reason: "key lookup: " + err.Error()}
	}
	// The look-up compared too. Here it is done in constant time, and need not be trusted.
	if subtle.ConstantTimeCompare(digest[:], k.digest) != 1 {
		id := key[len("tdb_"):][:keyIDLength]
		return Caller{}, a.deny(r, denial{reason: "unknown key", keyID: id})
	}
	if fault := k.fault(); fault != "" {
		return Caller{}, a.deny(r, denial{reason: fault + " key", keyID: k.id, isKey: true})
	}
	a.noteUse(ctx, k)
	return Caller{tenant: k.tenant, email: k.email, keyID: k.id, readOnly: k.readOnly}, nil
}

// deny is the answer to a bad key, whatever the reason, until one address has sent too many.
func (a *authenticator) deny(r *http.Request, d denial) error {
	d.kind = badKeyGiven
	if a.badKeys.add(source{address: addressOf(r)}) > failureBurst {
		d.kind = tooManyBadKeys
	}
	return &d
}

// noteUse writes down that a key was used, beside the request and one at a time. What it misses a
// later request notes, so its error is of no interest.
func (a *authenticator) noteUse(ctx context.Context, k keyRecord) {
	last, used := a.noted.Load(k.id)
	if used && time.Since(last.(time.Time)) < lastUsePrecision {
		return
	}
	if !a.touching.CompareAndSwap(false, true) {
		return
	}
	a.noted.Store(k.id, time.Now())
	go func() {
		defer a.touching.Store(false)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), authTimeout)
		defer cancel()
		_ = a.keys.TouchKey(ctx, k.id)
	}()
}

// openCaller admits r without a key, because there is no users_table. A web page must not be able
// to use its visitor's browser for that: neither by a cross-origin request, nor by a name of its
// own that resolves to this server (DNS rebinding).
func (a *authenticator) openCaller(r *http.Request) (Caller, error) {
	if a.requireAuth {
		return Caller{}, &denial{kind: usersRequired, reason: "no users_table"}
	}
	if !a.isOwnHost(r.Host) {
		return Caller{}, &denial{kind: foreignHost, reason: "foreign host"}
	}
	if err := new(http.CrossOriginProtection).Check(r); err != nil {
		return Caller{}, &denial{kind: crossOrigin, reason: "cross-origin"}
	}
	return Caller{tenant: openTenant, open: true}, nil
}

// isOwnHost tells whether a Host header names this server by something that no foreign page can
// bring its visitor's browser to send.
func (a *authenticator) isOwnHost(header string) bool {
	host := (&url.URL{Host: header}).Hostname()
	if host == "" {
		return false
	}
	if isLoopback(host) || host == a.host {
		return true
	}
	// A server on all addresses may be called by any of them: an address cannot be rebound.
	listensOn := net.ParseIP(a.host)
	return listensOn != nil && listensOn.IsUnspecified() && net.ParseIP(host) != nil
}

// isLoopback tells whether host, a name or an address without port, is this machine.
func isLoopback(host string) bool {
	address := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || address != nil && address.IsLoopback()
}

// source is what requests that are counted together have in common. The rest is for the log.
type source struct {
	address, keyID string
	status         int // 0: any
}

// tally counts requests by source, for a minute at a time.
type tally struct {
	ended  func(source, int) // gets each count when the minute is over; nil: nobody asks
	mu     sync.Mutex
	counts map[source]int // nil: no minute has begun
}

// add counts one more request of a source, and returns how many that makes.
func (t *tally) add(from source) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		t.counts = map[source]int{}
		time.AfterFunc(time.Minute, t.endMinute)
	}
	_, known := t.counts[from]
	if !known && len(t.counts) >= maxSources {
		from.address = "others" // which are counted together
	}
	t.counts[from]++
	return t.counts[from]
}

func (t *tally) endMinute() {
	t.mu.Lock()
	counts := t.counts
	t.counts = nil
	t.mu.Unlock()
	if t.ended == nil {
		return
	}
	for from, n := range counts {
		t.ended(from, n)
	}
}

// addressOf is where r comes from. X-Forwarded-For is not trusted: anyone can write it.
func addressOf(r *http.Request) string {
	address, _ := netip.ParseAddrPort(r.RemoteAddr)
	return address.Addr().String()
}

// A key: "tdb_", an id that may be shown, "_", 32 random bytes in base64url, and a CRC-32.
var keyPattern = regexp.MustCompile(`^(tdb_[a-z2-7]{8}_[A-Za-z0-9_-]{43})[A-Za-z0-9_-]{6}$`)

// newKey makes a key. It is the only source of keys. crypto/rand ends the program if it fails.
func newKey() (key, id string, digest []byte) {
	secret := make([]byte, 32)
	rand.Read(secret)
	id = strings.ToLower(rand.Text()[:keyIDLength]) // rand.Text writes base32
	key = withChecksum("tdb_" + id + "_" + base64.RawURLEncoding.EncodeToString(secret))
	sum := sha256.Sum256([]byte(key))
	return key, id, sum[:]
}

// withChecksum appends the CRC-32 of body to it.
func withChecksum(body string) string {
	sum := binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE([]byte(body)))
	return body + base64.RawURLEncoding.EncodeToString(sum)
}

// wellFormedKey tells whether key could be ours. It is no control: anyone can compute a checksum.
func wellFormedKey(key string) bool {
	parts := keyPattern.FindStringSubmatch(key)
	return parts != nil && withChecksum(parts[1]) == key
}
